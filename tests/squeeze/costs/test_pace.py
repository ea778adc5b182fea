"""Seconds from counted work: by the reference machine until jobs have finished, then by those that are most alike."""

import pytest

from squeeze.costs.pace import NEAREST, REFERENCE_METHODS, Past, duration, expected, reference_seconds
from squeeze.costs.work import STAGES, counted
from squeeze.steps.every import tag_of
from squeeze.steps.quantization import METHODS
from tests.squeeze.making import llama, spec

GPU = "NVIDIA H200"


def _past(factor: float, method: str = "gptq", device: str = GPU, blocks: int = 4) -> Past:
    """A job that took so many times what the reference machine would have."""
    work = {stage: count.whole for stage, count in counted(llama(blocks), spec(method)).items()}
    seconds = {stage: factor * reference_seconds(method, stage, each) for stage, each in work.items()}
    return Past(method, device, seconds, work)


def _reference(method: str = "gptq", blocks: int = 4) -> float:
    return sum(_past(1.0, method, blocks=blocks).seconds.values())


def test_every_method_has_a_reference_speed() -> None:
    pruning = {"magnitude", "wanda", "sparsegpt", "svd", "depth", "width"}
    assert set(REFERENCE_METHODS) == {tag_of(one).partition(".")[2] for one in METHODS} | pruning
    assert all(reference_seconds("gptq", stage, 1e12) > 0 for stage in STAGES)
    assert reference_seconds("qlora", "compressing", 1e12) == reference_seconds("gptq", "compressing", 1e12)


def test_pruning_goes_by_its_own_speed() -> None:
    seconds = {name: reference_seconds(name, "compressing", 1e12) for name in ("magnitude", "svd", "gptq")}
    assert seconds["svd"] < seconds["gptq"] < seconds["magnitude"], "the larger its products, the more a second"


def test_without_history_the_reference_machine_is_named() -> None:
    told = duration(counted(llama(), spec()), 4, "gptq", [], gpu=False)
    assert told.likely == pytest.approx(_reference(), rel=0.01)
    assert "reference machine" in told.basis and "factor of several" in told.basis
    assert told.low < told.likely < told.high
    assert "a GPU will be quicker" in duration(counted(llama(), spec()), 4, "gptq", [], gpu=True).basis


def test_with_history_the_history_counts() -> None:
    told = duration(counted(llama(), spec()), 4, "gptq", [_past(0.1), _past(0.2), _past(0.3)], gpu=True)
    assert told.likely == pytest.approx(0.2 * _reference(), rel=0.01)
    assert told.basis == f"from 3 jobs of gptq on this service's {GPU}"
    assert told.low <= 0.1 * _reference() < 0.3 * _reference() <= told.high


def test_each_stage_has_its_own_speed() -> None:
    slow = _past(1.0)
    slow = Past(slow.method, slow.device, slow.seconds | {"certifying": 5 * slow.seconds["certifying"]}, slow.work)
    told = duration(counted(llama(), spec()), 4, "gptq", [slow], gpu=False)
    assert told.stages["certifying"] == pytest.approx(slow.seconds["certifying"], abs=0.1)
    assert told.stages["compressing"] == pytest.approx(slow.seconds["compressing"], abs=0.1)


def test_the_device_that_worked_last_decides_and_other_methods_serve_where_there_are_none() -> None:
    past = [_past(0.1, "rtn"), _past(3.0, device="CPU, 2 threads")]
    told = duration(counted(llama(), spec()), 4, "gptq", past, gpu=False)
    assert told.likely == pytest.approx(0.1 * _reference(), rel=0.01)
    assert told.basis == f"from 1 job of other methods on this service's {GPU}"


def test_jobs_of_the_same_size_count_first() -> None:
    past = [_past(1.0)] * NEAREST + [_past(0.01, blocks=400)] * NEAREST
    small, large = (duration(counted(llama(n), spec()), n, "gptq", past, gpu=True) for n in (4, 400))
    assert small.likely == pytest.approx(_reference(), rel=0.01)
    assert large.likely == pytest.approx(0.01 * _reference(blocks=400), rel=0.01)
    far = duration(counted(llama(4000), spec()), 4000, "gptq", [_past(1.0)], gpu=True)
    assert far.high / far.likely > small.high / small.likely, "nothing of the size is known"


@pytest.mark.parametrize("past", [[], [_past(0.5)]])
def test_time_is_linear_in_blocks_with_the_fixed_part_apart(past: list[Past]) -> None:
    three, eighty = (duration(counted(llama(n, 1024), spec()), n, "gptq", past, gpu=False) for n in (3, 80))
    assert three.fixed == pytest.approx(eighty.fixed, rel=0.01)
    assert three.per_block == pytest.approx(eighty.per_block, rel=0.01)
    for told, blocks in ((three, 3), (eighty, 80)):
        assert told.likely == pytest.approx(told.fixed + blocks * told.per_block, rel=0.01)
        assert sum(told.stages.values()) == pytest.approx(told.likely, rel=0.01)


def test_a_report_without_some_stage_still_tells_of_the_others() -> None:
    some = _past(2.0)
    work = {stage: each for stage, each in some.work.items() if stage != "evaluating"}
    assert expected(_past(1.0).work, "gptq", [Past("gptq", GPU, some.seconds, work)])["evaluating"] == pytest.approx(
        2 * _past(1.0).seconds["evaluating"]
    )
