"""The other ways to distill: hidden states and relations, the teacher's own text, the student's own text."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.distill.hidden import _related, mapped
from models.distill.lesson import Lesson
from models.distill.on_policy import OfItsOwn, _prompt
from models.distill.writing import gone_on
from models.pipeline import run
from models.texts.material import read_tokenizer
from models.train.packing import Batch, batch_of
from models.train.task import accelerator_of
from squeeze.errors import ArchitectureUnsupported
from squeeze.steps.distillation import Distill
from tests.models.distill.parts import inputs_of, teacher
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES, VOCABULARY
from tests.models.train.parts import begin, go_on, seen, written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of half the width."""
    return FAMILIES["llama"](tmp_path_factory.mktemp("narrow") / "model", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize(
    "step",
    [
        {"method": "hidden"},
        pytest.param({"method": "hidden", "match": "cosine", "alpha": 0.5}, marks=pytest.mark.slow),
        pytest.param({"method": "hidden", "match": "relations"}, marks=pytest.mark.slow),
        {"method": "on_policy", "new_tokens": 8, "steps": 8},
        {"method": "sequence", "new_tokens": 12, "temperature": 0},
    ],
    ids=lambda step: "-".join([step["method"], *([step["match"]] if "match" in step else [])]),
)
def test_what_is_to_fall_falls_and_a_training_that_goes_on_repeats_it(
    tmp_path: Path, model: Path, step: dict[str, Any]
) -> None:
    story = go_on(inputs_of(step, model, tmp_path / "one"))[1]
    losses = [one.loss for one in story.curve]
    assert sum(losses[-3:]) < sum(losses[:3])
    again = inputs_of(step | {"steps": step.get("steps", 12)}, model, tmp_path / "two")
    stopped = Stopping(len(losses) // 2)
    with pytest.raises(Stopped):
        go_on(again, stopped)
    gone_on = go_on(again)[1]
    assert gone_on.resumed == [stopped.step - 1] and seen(gone_on) == seen(story)


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Stopping(Heard):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "steps" and done == self.step:
            raise Stopped


@pytest.mark.parametrize("match", ["mse", "cosine", "relations"])
def test_a_narrower_student_learns_through_a_matrix_that_is_left_behind(
    tmp_path: Path, model: Path, narrow: Path, match: str
) -> None:
    inputs = inputs_of({"method": "hidden", "match": match, "student": {"model": "org/n"}}, model, tmp_path)
    task, story = go_on(dataclasses.replace(inputs, student=narrow, student_name="org/n"))
    assert story.curve[-1].loss < story.curve[0].loss
    matrices = [name for name in task.learning if name.startswith("beside.")]
    assert len(matrices) == (0 if match == "relations" else 2)
    assert not any(name.startswith("beside") for name, _ in task.model.named_parameters())


def test_blocks_learn_from_those_at_the_same_depth() -> None:
    assert mapped(2, 4) == [(0, 1), (1, 3)] and mapped(3, 5) == [(0, 0), (1, 2), (2, 4)]
    assert mapped(4, 4) == [(n, n) for n in range(4)] and mapped(4, 2) == [(1, 0), (3, 1)]


def test_tokens_relate_to_those_before_them_in_their_own_example_alone() -> None:
    owners = torch.tensor([[0, 0, 0, 1, 1, -1]])
    blank = torch.zeros_like(owners)
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    found = _related(states, 2, Batch(blank, blank, blank, owners)).exp()
    assert found.shape == (1, 2, 6, 6)
    wanted: Tensor = (states[0, 2:3, 4:] @ states[0, :3, 4:].T / 2).softmax(-1)
    torch.testing.assert_close(found[0, 1, 2, :3], wanted[0])
    assert found[0, 0, 3, :3].sum() == 0 and found[0, 0, 2, 3:].sum() == 0


def test_a_model_without_projections_of_its_own_has_no_relations_to_match(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"](tmp_path / "model", n_layer=3)
    with pytest.raises(ArchitectureUnsupported, match="take match `mse` or `cosine`") as refused:
        begin(inputs_of({"method": "hidden", "match": "relations"}, model, tmp_path / "room"))
    assert refused.value.param == "match"


def test_a_student_writes_after_the_prompts_and_both_models_judge_what_it_wrote(tmp_path: Path, model: Path) -> None:
    _, task = begin(inputs_of({"method": "on_policy", "new_tokens": 6}, model, tmp_path))
    batch = batch_of(task.examples, task.plan.batch(0)[:2])
    assert isinstance(task.objective, OfItsOwn)
    found = task.objective._own(task.model, batch)
    assert found is not None
    own, weights = found
    numbers = sorted({one for one in batch.owners.flatten().tolist() if one >= 0})
    assert len(own.ids) == len(numbers)
    for row, number in enumerate(numbers):
        prompt = _prompt(task.examples, number, 16, None)
        ids, scored = task.examples.one(number)
        assert prompt.tolist() == ids[: int(scored.nonzero()[0, 0])].tolist() == own.ids[row, : len(prompt)].tolist()
        targets = own.targets[row][own.targets[row] >= 0]
        assert 1 <= len(targets) <= 6
        assert own.ids[row, len(prompt) : len(prompt) + len(targets)].tolist() == targets.tolist()
    # What is written after one prompt weighs as much as the example has learned tokens.
    owners = batch.owners[batch.targets >= 0].tolist()
    weighed = torch.zeros(len(numbers)).index_add(0, own.owners[own.targets >= 0], weights)
    torch.testing.assert_close(weighed, torch.tensor([float(owners.count(number)) for number in numbers]))
    losses = task.objective(task.model, batch, packed=task.packed)
    assert losses.shape[0] > 0 and torch.isfinite(losses).all() and losses.requires_grad


def test_what_a_student_learns_from_itself_does_not_depend_on_how_a_batch_is_cut(tmp_path: Path, model: Path) -> None:
    step = {"method": "on_policy", "new_tokens": 6, "own_share": 0.5, "alpha": 0.7, "steps": 4}
    whole, cut = (
        go_on(inputs_of(step | {"micro_batch_size": size}, model, tmp_path / str(size)))[1] for size in (None, 1)
    )
    assert [one.loss for one in cut.curve] == pytest.approx([one.loss for one in whole.curve], abs=1e-5)


def test_what_is_written_after_a_prompt_does_not_depend_on_what_is_written_beside_it(model: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dice = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 500, (length,), generator=dice) for length in (5, 9, 2)]
    drawn = torch.rand(3, 6, generator=dice, dtype=torch.float64)
    together = gone_on(whole, prompts, 6, 0.7, [], VOCABULARY, drawn)
    for prompt, row, wrote in zip(prompts, drawn, together, strict=True):
        (alone,) = gone_on(whole, [prompt], 6, 0.7, [], VOCABULARY, row[None])
        assert alone.tolist() == wrote.tolist()


def test_numbers_that_were_drawn_evenly_choose_tokens_as_often_as_they_are_likely(model: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt, count = torch.arange(3, 9), 4000
    even = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    chosen = torch.cat(gone_on(whole, [prompt] * count, 1, 0.5, [], VOCABULARY, even))
    with torch.no_grad():
        likely = (whole(prompt[None]).logits[0, -1, :VOCABULARY].double() / 0.5).softmax(-1)
    often = torch.bincount(chosen, minlength=VOCABULARY).double() / count
    assert float((often - likely).abs().max()) < 1.01 / count


def test_the_teacher_s_text_is_what_it_writes_and_the_held_out_is_the_user_s(tmp_path: Path, model: Path) -> None:
    step = {"method": "sequence", "new_tokens": 12, "temperature": 0}
    inputs, heard = inputs_of(step, model, tmp_path), Heard()
    prepared, _ = begin(inputs)
    whole, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), read_tokenizer(model)
    rows = [
        json.loads(line)
        for line in next(inputs.work.glob("teacher/wrote/*/records.jsonl")).read_text().split("\n")[:-1]
    ]
    given = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().split("\n")]
    held_out = [json.loads(line) for line in (inputs.work / "held-out-as-it-is.jsonl").read_text().split("\n")[:-1]]
    assert len(rows) + len(held_out) == len(given) and all(row in given for row in held_out)
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in given if row not in held_out}
    for row in rows[:3]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        out = whole.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == row["completion"]
    assert prepared.split.data.origin.endswith("as the teacher ends it")
    assert prepared.split.data.held_out_origin == "file-abcdefgh" and not heard.messages


def test_what_the_teacher_wrote_is_not_written_again(tmp_path: Path, model: Path) -> None:
    step = {"method": "sequence", "new_tokens": 8}
    inputs = inputs_of(step, model, tmp_path)
    begin(inputs)
    files = sorted(inputs.work.glob("teacher/wrote/*/0*.json"))
    before = {file: file.read_text() for file in files}
    assert len(files) > 2
    times = {file: file.stat().st_mtime_ns for file in files[:-1]}
    files[-1].unlink()
    begin(inputs)
    assert {file: file.read_text() for file in files} == before  # drawn by its own seed
    assert {file: file.stat().st_mtime_ns for file in files[:-1]} == times


def test_chats_and_texts_are_gone_on_with_and_a_student_of_another_tokenizer_learns_them(
    tmp_path: Path, model: Path
) -> None:
    student = FAMILIES["llama"](tmp_path / "student")
    told = json.loads((student / "tokenizer.json").read_text())
    words = list(told["model"]["vocab"])
    vocabulary = told["model"]["vocab"]
    vocabulary[words[300]], vocabulary[words[301]] = vocabulary[words[301]], vocabulary[words[300]]
    (student / "tokenizer.json").write_text(json.dumps(told))
    inputs = inputs_of({"method": "sequence", "student": {"model": "org/s"}, "steps": 2}, model, tmp_path / "room")
    texts = [{"text": f"The number {n} comes before the number {n + 1}, as everybody knows."} for n in range(20)]
    inputs = dataclasses.replace(
        inputs, calibration_text=written(tmp_path / "texts.jsonl", texts), student=student, student_name="org/s"
    )
    assert len(go_on(inputs)[1].curve) == 2
    prepared, task = begin(inputs)
    step = prepared.step
    assert isinstance(step, Distill) and not prepared.comparable
    lesson = Lesson(prepared, inputs, Heard())
    accelerator = accelerator_of(prepared.precision, prepared.device)
    assert lesson.apart(task, accelerator) is None and lesson.told(None, None).loss_teacher is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hidden", "sequence", "on_policy"])
def test_a_whole_job_of_each_method_is_certified(tmp_path: Path, model: Path, method: str) -> None:
    outcome = run(inputs_of({"method": method, "steps": 4}, model, tmp_path), Heard())
    training = outcome.report.training
    assert training is not None and training.distillation is not None
    assert training.distillation.stored_bytes_per_token is None
    assert outcome.report.certificates[0].outcome == "passed"
