"""The fraction of a whole job grows, never shrinks, and reaches 1 only when the job is published."""

from hypothesis import given
from hypothesis import strategies as st

from squeeze.objects import Stage
from workers.fraction import WEIGHTS, Course


def test_the_shares_of_all_stages_make_one_job() -> None:
    assert set(WEIGHTS) == set(Stage)
    assert abs(sum(WEIGHTS.values()) - 1.0) < 1e-9


@given(st.lists(st.tuples(st.sampled_from(Stage), st.integers(0, 50), st.integers(0, 40)), max_size=40))
def test_the_fraction_never_goes_back_nor_reaches_one(steps: list[tuple[Stage, int, int]]) -> None:
    course, last = Course(), 0.0
    for stage, done, total in steps:
        course.enter(stage)
        course.advance(done, total)
        assert last <= course.fraction < 1.0
        last = course.fraction


def test_the_time_left_follows_from_the_time_spent() -> None:
    course = Course()
    assert course.eta_seconds(100.0) is None, "too early to tell"
    course.enter(Stage.compressing)
    course.advance(1, 2)
    eta = course.eta_seconds(100.0)
    assert eta is not None
    assert abs(eta - 100.0 * (1 - course.fraction) / course.fraction) < 1e-9
