"""The rules behind `auto`, each on numbers that can be checked by hand."""

import pytest
from pydantic import ValidationError

from squeeze.specs.choosing import Choice, batch_for, length_for, micro_batch_for, rate_for, settled, supposed
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import Finetune

AUTO = {"learning_rate": "auto", "batch_size": "auto", "micro_batch_size": "auto"}


def spec_of(method: str = "lora", length: int | str = "auto", **changes: object) -> JobSpec:
    step = {"kind": "finetune", "method": method} | AUTO | changes
    data = {"source": "file-abcdefgh", "sequence_length": length}
    return JobSpec.model_validate({"model": "org/model", "steps": [step], "data": data})


def step_of(spec: JobSpec) -> Finetune:
    step = spec.steps[0]
    assert isinstance(step, Finetune)
    return step


def test_a_sequence_holds_95_percent_of_the_examples_in_steps_of_64_tokens() -> None:
    lengths = [*range(1, 101)]  # 95 of these are at most 95
    choice = length_for(lengths, 4096)
    assert choice.value == 128
    assert "at most 95 tokens (the longest 100)" in choice.why
    assert length_for([64] * 20, 4096).value == 64
    assert length_for([65] * 20, 4096).value == 128


def test_a_sequence_is_no_longer_than_the_model_reads() -> None:
    assert length_for([5000], 100).value == 100


@pytest.mark.parametrize(
    ("length", "sequences", "gpus", "batch"),
    [
        (2048, None, 1, 8),  # 16,384 tokens
        (1000, None, 1, 16),
        (64, 100_000, 1, 256),
        (64, 320, 1, 8),  # 10 would make 32 steps
        (64, 3, 1, 1),
        (131_072, None, 1, 1),
        (64, 3, 4, 4),
    ],
)
def test_a_batch_has_so_many_tokens_and_an_epoch_so_many_steps(
    length: int, sequences: int | None, gpus: int, batch: int
) -> None:
    assert batch_for(length, sequences, gpus).value == batch


@pytest.mark.parametrize(
    ("method", "parameters", "rate"),
    [
        ("lora", 1e9, 1e-3),
        ("lora", 8e9, 3e-4),
        ("qlora", 7e10, 3e-4),
        ("full", 1e9, 1e-4),
        ("full", 8e9, 3e-5),
        ("last_layers", 8e9, 3e-5),
        ("ia3", 8e9, 3e-3),
        ("prompt", 8e9, 3e-2),
    ],
)
def test_a_learning_rate_goes_by_method_and_size(method: str, parameters: float, rate: float) -> None:
    choice = rate_for(step_of(spec_of(method)), int(parameters))
    assert choice.value == pytest.approx(rate)
    assert choice.why


def test_a_micro_batch_is_the_largest_power_of_two_that_fits_in_four_fifths_of_the_memory() -> None:
    assert micro_batch_for(8, lambda size: 10 * size, 100).value == 8
    assert micro_batch_for(9, lambda size: 10 * size, 100).value == 8
    assert micro_batch_for(32, lambda size: 10 * size, 100).value == 8
    assert micro_batch_for(32, lambda size: 1000 + size, 100).value == 1


def test_what_was_chosen_stands_where_auto_stood() -> None:
    spec = spec_of()
    values: list[Choice] = [
        Choice(name="sequence_length", value=128, why=""),
        Choice(name="batch_size", value=16, why=""),
        Choice(name="micro_batch_size", value=4, why=""),
        Choice(name="learning_rate", value=1e-3, why=""),
    ]
    after, step = settled(spec, step_of(spec), values)
    assert after.steps[0] is step
    assert (after.data.length, step.sequences, step.together, step.rate) == (128, 16, 4, 1e-3)
    assert JobSpec.model_validate_json(after.model_dump_json()) == after


def test_a_plan_tells_what_needs_no_look_at_the_examples() -> None:
    spec = spec_of()
    after, step, told = supposed(spec, step_of(spec), 10**9, 1024)
    assert [(one.name, one.value) for one in told] == [("learning_rate", 1e-3)]
    assert (after.data.length, step.sequences, step.together) == (1024, 16, 16)


def test_auto_is_refused_where_nothing_could_be_found() -> None:
    with pytest.raises(ValidationError, match="looks at training examples"):
        JobSpec.model_validate(
            {"model": "o/m", "steps": [{"kind": "quantize", "method": "gptq"}], "data": {"sequence_length": "auto"}}
        )
    distill = {"kind": "distill", "method": "logits", "student": {"layers": 2}}
    for name in AUTO:
        with pytest.raises(ValidationError):
            JobSpec.model_validate({"model": "o/m", "steps": [distill | {name: "auto"}]})
    with pytest.raises(ValidationError, match="tried on one GPU"):
        JobSpec.model_validate(spec_of().model_dump() | {"limits": {"gpus": 2}})
