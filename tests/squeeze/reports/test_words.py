"""A step in one line says what counts, and nothing else."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from squeeze.reports.words import GOES_WITH, size_text, step_text
from squeeze.steps.every import Step


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (
            {"kind": "prune", "method": "width", "params_target": 0.7},
            "prune by width, params_target 0.7, importance activation",
        ),
        (
            {"kind": "prune", "method": "depth", "speed_target": 1.5, "importance": "perplexity"},
            "prune by depth, speed_target 1.5, speed_of writing, importance perplexity, iterative False",
        ),
        ({"kind": "prune", "method": "wanda"}, "prune by wanda, sparsity 0.5, distribution uniform"),
        (
            {"kind": "prune", "method": "wanda", "distribution": "owl"},
            "prune by wanda, sparsity 0.5, distribution owl, outlier_multiple 5.0, outlier_spread 0.08",
        ),
        ({"kind": "quantize", "method": "nf4"}, "quantize by nf4, double_quantization True"),
    ],
)
def test_parameters_without_effect_are_left_out(step: dict[str, Any], line: str) -> None:
    told: Any = TypeAdapter(Step).validate_python(step)
    assert step_text(told.model_dump(mode="json")) == line


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (2.5, "2.50 times smaller"),
        (0.9995, "as large as before"),
        (1.004, "as large as before"),
        (0.5, "2.00 times larger"),
    ],
)
def test_a_size_is_told_as_what_it_is_to_the_one_before(ratio: float, words: str) -> None:
    assert size_text(ratio) == words


def test_what_a_student_is_not_is_left_out() -> None:
    line = "distill by logits, student {'layers': 2}, optimizer galore, projection_rank 8"
    step = {"kind": "distill", "method": "logits", "student": {"layers": 2, "model": None}, "steps": None}
    assert step_text(step | {"optimizer": "galore", "projection_rank": 8, "block_steps": 50}) == line
    assert step_text({"kind": "distill", "method": "logits", "student": {"layers": None}}) == "distill by logits"


def test_what_has_an_effect_with_another_alone_is_called_as_specs_call_it() -> None:
    known = {name for sides in _fields() for name in sides}
    assert set(GOES_WITH) | {other for other, _ in GOES_WITH.values()} <= known


def _fields() -> list[set[str]]:
    schema = TypeAdapter(Step).json_schema()
    return [set(each.get("properties", {})) for each in schema["$defs"].values()]
