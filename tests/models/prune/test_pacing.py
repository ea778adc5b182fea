"""Targets of speed: what is taken meets them as timed, the next larger does not; what can't be met says what can."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models.prune.slimming.pacing import _first, measured, quick_enough
from squeeze.errors import SpecInvalid
from squeeze.reports.report import Speed
from squeeze.reports.speed import SpeedTarget
from squeeze.shapes.widths import Widths
from squeeze.steps.slimming import Depth
from tests.models import tiny
from tests.models.job_parts import Heard, digests
from tests.models.prune.slim_parts import slim

SECONDS = {"seconds": torch.tensor([1.0, 2.0, 2.0, 4.0])}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.mark.parametrize(("target", "gone", "enough"), [(1.2, [0], True), (1.3, [0], False), (1.3, [0, 1], True)])
def test_as_much_goes_as_makes_it_quick_enough(target: float, gone: list[int], enough: bool) -> None:
    assert quick_enough(Depth(method="depth", speed_target=target), SECONDS, gone) == enough


def test_the_first_place_that_is_quick_enough_is_found_with_few_trials() -> None:
    path = [Widths(128, inner, 2, 2, 32) for inner in range(512, 0, -8)]
    tried: list[int] = []

    def quick(widths: Widths) -> bool:
        tried.append(widths.inner)
        return widths.inner <= 200

    assert path[_first(path, quick)].inner == 200 and len(tried) <= math.ceil(math.log2(len(path)))


def test_a_result_that_is_much_slower_than_when_it_was_timed_is_warned_of() -> None:
    target = SpeedTarget(asked=1.5, speed_of="writing", timed=1.6, next_larger=1.4)
    before, after = (Speed(prompt_tokens=128, prompt=100.0, writing=each) for each in (8.0, 11.0))
    assert measured(target, before, after) == (target.model_copy(update={"measured": 1.375}), [])
    _, (warning,) = measured(target, before, after.model_copy(update={"writing": 10.0}))
    assert "1.25 times as fast" in warning and "1.5 were asked for" in warning


@pytest.mark.parametrize(
    "step",
    [
        {"speed_target": 1.2},
        pytest.param({"speed_target": 1.2, "importance": "perplexity", "iterative": True}, marks=pytest.mark.slow),
        {"method": "width", "speed_target": 1.02, "speed_of": "prompt"},
    ],
)
def test_what_is_taken_meets_the_target_as_timed_and_another_attempt_takes_the_same(
    tmp_path: Path, model: Path, step: dict[str, Any]
) -> None:
    done = slim(step, model, tmp_path)
    told = done.slimming
    assert told.speed_target is not None and told.speed_target.timed >= step["speed_target"]
    assert told.speed_target.next_larger is None or told.speed_target.next_larger < step["speed_target"]
    speeds = [getattr(each, told.speed_target.speed_of) for each in (told.speed_before, told.speed_after)]
    assert told.speed_target.measured == pytest.approx(speeds[1] / speeds[0])
    assert told.parameters_after < told.parameters_before
    again = slim(step, model, tmp_path)
    assert digests(again.whole) == digests(done.whole) and again.slimming.speed_target is not None
    assert again.slimming.speed_target.timed == told.speed_target.timed


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"speed_target": 3.999}, "with one decoder block left the model is"),
        ({"method": "width", "speed_target": 3.9}, "with half of the neurons, heads and channels the model is"),
    ],
)
def test_what_the_machine_can_t_do_ends_the_job_with_what_it_can(
    tmp_path: Path, model: Path, step: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecInvalid, match=words) as refused:
        slim(step, model, tmp_path, Heard())
    assert refused.value.param == "steps.0.speed_target" and "can be at most" in refused.value.message
