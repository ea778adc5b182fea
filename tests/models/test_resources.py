"""What a process uses, as its report tells it."""

import itertools
import time

import pytest

from models.resources import Clock


def test_a_stage_within_another_is_no_part_of_it_and_one_that_comes_twice_counts_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(2 ** next(ticks)))
    clock = Clock()
    with clock.stage("loading"):  # from 1
        with clock.stage("teaching"):  # 2 to 4
            pass
        with clock.stage("teaching"), clock.stage("reading"):  # 8, in it 16 to 32, to 64
            pass
    with clock.stage("loading"):  # from 128, after 256, to 512
        pass
    assert clock.seconds == {"teaching": 2.0 + 40.0, "reading": 16.0, "loading": 127.0 - 58.0 + 256.0}
