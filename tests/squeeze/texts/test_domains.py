"""Steps that weigh domains: what they need, and which jobs have nothing to weigh."""

from typing import Any

import pytest
from pydantic import ValidationError

from squeeze.errors import DataUnusable
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import DISTILLING_METHODS
from squeeze.steps.finetuning import LoRA
from squeeze.texts.domains import domained_in, takes_something
from squeeze.texts.records import Chat, Exchange, Faults, Text

WEIGHED = {"domain_column": "kind", "evaluate_every": 5}
WIDTH = {"kind": "prune", "method": "width", "params_target": 0.9}
FULL = {"kind": "finetune", "method": "full"}
LOGITS = {"kind": "distill", "method": "logits"}
TRIM = {"kind": "prune", "method": "vocabulary"}
WANDA = {"kind": "prune", "method": "wanda"}


def job(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/base", "steps": steps, "data": {"source": "file-abcdefgh"}} | fields)


@pytest.mark.parametrize(
    "steps",
    [
        [WIDTH, FULL | WEIGHED],
        [WIDTH, {"kind": "finetune", "method": "lora", "merge": True} | WEIGHED],
        [TRIM, WIDTH, FULL | WEIGHED],
        [WIDTH, LOGITS | WEIGHED],
        [LOGITS | WEIGHED | {"student": {"layers": 2}}],
        [WIDTH, LOGITS | WEIGHED, WIDTH, FULL | WEIGHED],
    ],
)
def test_a_job_that_lost_something_weighs_domains(steps: list[dict[str, Any]]) -> None:
    assert job(*steps).domain_column == "kind"


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([FULL | WEIGHED], {}, "steps.0.domain_column: domains are weighed by what was lost in each, and nothing was"),
        ([FULL | WEIGHED, WIDTH], {}, "let a step before prune it"),
        ([WIDTH, FULL | {"domain_column": "kind"}], {}, "say `evaluate_every` beside domain_column"),
        ([WIDTH, LOGITS | WEIGHED, WIDTH, FULL], {}, "let all of them name the same domain_column"),
        ([WIDTH, {"kind": "finetune", "method": "head"} | WEIGHED], {}, "head learns labels: leave domain_column out"),
        ([WIDTH, {"kind": "distill", "method": "sequence"} | WEIGHED], {}, "sequence learns what the teacher writes"),
        ([WIDTH, TRIM, FULL | WEIGHED], {}, "let vocabulary be the first step"),
        ([TRIM, FULL | WEIGHED], {}, "nothing was taken from the model"),
        ([WIDTH, LOGITS | WEIGHED], {"data": {}}, "data.source names no file or dataset"),
    ],
)
def test_what_can_t_be_weighed_is_refused(steps: list[dict[str, Any]], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        job(*steps, **fields)


def test_what_was_zeroed_or_distilled_is_less_and_what_was_finetuned_is_not() -> None:
    assert [takes_something(step) for step in job(WIDTH, LOGITS, WANDA).steps] == [True, True, True]
    assert not takes_something(LoRA(method="lora"))
    assert all(("domain_column" in one.model_fields) for one in DISTILLING_METHODS)


def test_any_record_may_name_its_domain_and_wrong_ones_are_told_at_once() -> None:
    rows: list[tuple[str, object]] = [
        ("line 1", {"text": "a", "kind": "x"}),
        ("line 2", {"prompt": "a", "completion": "b", "kind": 3}),
        ("line 3", {"messages": [{"role": "assistant", "content": "c"}], "kind": True}),
        ("line 4", {"text": None, "kind": "x"}),
        ("line 5", {"text": "a"}),
        ("line 6", {"text": "a", "kind": "x" * 300}),
        ("line 7", {"kind": "x"}),
    ]
    faults = Faults()
    found = [(where, type(one.record), one.domain) for where, one in domained_in(rows, None, "kind", faults)]
    assert found == [("line 1", Text, "x"), ("line 2", Exchange, "3"), ("line 3", Chat, "true")]
    with pytest.raises(DataUnusable) as refused:
        faults.refuse_any()
    assert [line.split(" ")[1].rstrip(":") for line in refused.value.message.splitlines()] == ["5", "6", "7"]
