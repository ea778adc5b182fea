"""Students that are cut from their teacher: the same blocks, in new places, under names that transformers loads."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models.distill.cutting import cut
from models.files.architectures import architecture_of
from models.files.checkpoint import open_model
from models.pipeline import check
from squeeze.errors import ArchitectureUnsupported, ModelMalformed
from squeeze.shapes.architectures import ARCHITECTURES
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import evenly
from tests.models.tiny import FAMILIES, FIELDS

COMMON = ("bloom", "cohere2", "deepseek_v3", "gpt2", "llama", "mixtral", "opt", "qwen2_moe", "smollm3")
KEPT = (0, 2, 3)


def taught(path: Path, family: str, **fields: Any) -> Path:
    """A model of four blocks."""
    names = [name for name in ("num_hidden_layers", "n_layer", "n_layers") if name in FIELDS[family]]
    by_block = {
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "no_rope_layers": [1, 0, 0, 1],
    }
    return FAMILIES[family](
        path, **dict.fromkeys(names, 4), **{name: by_block[name] for name in by_block.keys() & FIELDS[family]}, **fields
    )


@pytest.mark.parametrize(
    "family", [one if one in COMMON else pytest.param(one, marks=pytest.mark.slow) for one in ARCHITECTURES]
)
def test_a_student_says_what_its_blocks_said_inside_of_the_teacher(tmp_path: Path, family: str) -> None:
    teacher = open_model(taught(tmp_path / "model", family))
    student = AutoModelForCausalLM.from_pretrained(cut(teacher, KEPT, tmp_path / "out").path, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(student(input_ids=ids, use_cache=False).logits, skipping(teacher.path, family, ids))


def skipping(path: Path, family: str, ids: Tensor) -> Tensor:
    """Logits of the whole model where the other blocks hand on what they are given."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    blocks = model.get_submodule(architecture_of({"model_type": family}).blocks)
    assert isinstance(blocks, nn.ModuleList)

    def passed_on(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    for number, block in enumerate(blocks):
        if number not in KEPT:
            block.register_forward_hook(passed_on, with_kwargs=True)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def test_blocks_are_taken_evenly_with_the_first_and_the_last() -> None:
    assert [evenly(12, wanted) for wanted in (1, 2, 4)] == [(0,), (0, 11), (0, 4, 7, 11)]
    for count in range(2, 40):
        for wanted in range(2, count + 1):
            kept = evenly(count, wanted)
            gaps = {later - earlier for earlier, later in itertools.pairwise(kept)}
            assert (kept[0], kept[-1], len(kept)) == (0, count - 1, wanted)
            assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1


def test_a_student_of_as_many_blocks_or_more_is_refused_from_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((FAMILIES["llama"](tmp_path / "model") / "config.json").read_bytes())
    for layers in (2, 5):
        step = {"kind": "distill", "method": "logits", "student": {"layers": layers}}
        with pytest.raises(ModelMalformed, match="has 2 decoder blocks") as refused:
            check(JobSpec.model_validate({"model": "org/model", "steps": [step]}), tmp_path)
        assert refused.value.param == "steps.0.student.layers"


def test_blocks_that_would_change_in_another_place_are_refused(tmp_path: Path) -> None:
    teacher = open_model(FAMILIES["gpt2"](tmp_path / "model", n_layer=3, scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ArchitectureUnsupported, match="depends on the number of its block"):
        cut(teacher, (0, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_there_is_taken_and_another_teacher_s_is_not(tmp_path: Path) -> None:
    teacher = open_model(FAMILIES["llama"](tmp_path / "model", num_hidden_layers=3))
    first = cut(teacher, (0, 2), tmp_path / "out").path.stat().st_mtime_ns
    assert cut(teacher, (0, 2), tmp_path / "out").path.stat().st_mtime_ns == first
    other = open_model(FAMILIES["llama"](tmp_path / "other", num_hidden_layers=4))
    assert cut(other, (0, 3), tmp_path / "out").path.stat().st_mtime_ns != first
