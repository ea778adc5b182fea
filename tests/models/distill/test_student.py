"""A student that is a model of its own: what it must share with its teacher, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from models.distill.vocabulary import shared_vocabulary
from models.pipeline import check_student
from models.train.prepare import prepare
from squeeze.errors import ModelAlreadyCompressed, VocabulariesDiffer
from squeeze.steps.distillation import Distill
from tests.models.distill.parts import distilling, inputs_of
from tests.models.tiny import FAMILIES, VOCABULARY
from tests.models.train.parts import go_on


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose table of embeddings is filled up."""
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model", vocab_size=VOCABULARY + 64)


def test_a_student_of_another_family_learns_from_a_teacher_whose_table_is_longer(tmp_path: Path, model: Path) -> None:
    student = FAMILIES["gpt2"](tmp_path / "student")
    inputs = inputs_of({"student": {"model": "org/small"}, "steps": 6}, model, tmp_path)
    inputs = dataclasses.replace(inputs, student=student, student_name="org/small", student_revision="4567def")
    step = inputs.spec.steps[0]
    assert isinstance(step, Distill)
    prepared = prepare(inputs, step)
    assert prepared.vocabulary == shared_vocabulary(model, student) == VOCABULARY
    assert prepared.student == "org/small@4567def" and prepared.teacher is not None
    assert (prepared.source.path, prepared.teacher.path) == (student, model)
    story = go_on(inputs)[1]
    assert story.curve[-1].loss < story.curve[0].loss
    other = dataclasses.replace(inputs, student_revision="89abcde")
    assert prepare(other, step).mark != prepared.mark


def test_a_student_of_another_tokenizer_is_refused_before_anything_is_read(tmp_path: Path, model: Path) -> None:
    student = FAMILIES["llama"](tmp_path / "student")
    told = json.loads((student / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (student / "tokenizer.json").write_text(json.dumps(told))
    inputs = inputs_of({"student": {"model": "org/small"}}, model, tmp_path)
    step = inputs.spec.steps[0]
    assert isinstance(step, Distill)
    with pytest.raises(VocabulariesDiffer, match="cut text into other tokens") as refused:
        prepare(dataclasses.replace(inputs, student=student), step)
    assert refused.value.param == "student.model"


def test_special_tokens_of_one_s_own_make_no_other_vocabulary(tmp_path: Path, model: Path) -> None:
    student = shutil.copytree(model, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(student)
    assert shared_vocabulary(model, student) == VOCABULARY


def test_a_student_s_config_alone_tells_that_it_can_t_be_trained(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = distilling({"student": {"model": "org/small"}})
    assert check_student(spec, tmp_path).blocks == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelAlreadyCompressed):
        check_student(spec, tmp_path)
