"""The fraction of a whole job grows, never shrinks, and reaches 1 only when the job is published."""

from hypothesis import given
from hypothesis import strategies as st

from squeeze.costs.work import STAGES
from squeeze.objects import Stage
from workers.fraction import WEIGHTS, Course


def test_the_shares_of_all_stages_make_one_job() -> None:
    assert set(WEIGHTS) == set(Stage)
    assert abs(sum(WEIGHTS.values()) - 1.0) < 1e-9


MOMENT = st.tuples(st.sampled_from(Stage), st.integers(0, 50), st.integers(0, 40), st.floats(0, 1e4))
SECONDS = st.none() | st.dictionaries(st.sampled_from(STAGES), st.floats(0, 1e6))


@given(st.lists(st.tuples(MOMENT, SECONDS), max_size=40))
def test_whatever_is_expected_and_told_the_time_left_is_none_or_not_negative(
    told: list[tuple[tuple[Stage, int, int, float], dict[str, float] | None]],
) -> None:
    course, last, at = Course(), 0.0, 0.0
    for (stage, done, total, seconds), expected in told:
        at += seconds
        course.enter(stage, at)
        if expected is not None:
            course.expect(expected, at)
        course.advance(done, total)
        assert last <= course.fraction < 1.0
        last = course.fraction
        eta = course.eta_seconds(at + 1.0)
        assert eta is None or eta >= 0.0


@given(st.lists(st.tuples(st.sampled_from(Stage), st.integers(0, 50), st.integers(0, 40)), max_size=40))
def test_the_fraction_never_goes_back_nor_reaches_one(steps: list[tuple[Stage, int, int]]) -> None:
    course, last = Course(), 0.0
    for stage, done, total in steps:
        course.enter(stage, 0.0)
        course.advance(done, total)
        assert last <= course.fraction < 1.0
        last = course.fraction


def test_the_time_left_follows_from_the_time_spent() -> None:
    course = Course()
    assert course.eta_seconds(100.0) is None, "too early to tell"
    course.enter(Stage.compressing, 0.0)
    course.advance(1, 2)
    eta = course.eta_seconds(100.0)
    assert eta is not None
    assert abs(eta - 100.0 * (1 - course.fraction) / course.fraction) < 1e-9


EXPECTED = {"loading": 1.0, "compressing": 10.0, "evaluating": 1.0, "exporting": 2.0, "certifying": 30.0}


def _compressed(taken: float) -> Course:
    """A job that took so many seconds to compress, and now exports."""
    course = Course()
    course.enter(Stage.loading, 5.0)
    course.expect(EXPECTED, 5.0)
    course.enter(Stage.calibrating, 6.0)
    course.enter(Stage.compressing, 6.0)
    course.advance(4, 4)
    course.enter(Stage.evaluating, 6.0 + taken)
    course.advance(8, 8)
    course.enter(Stage.exporting, 7.0 + taken)
    return course


def test_stages_share_the_rest_of_the_job_as_they_are_expected_to_take() -> None:
    course = _compressed(10.0)
    before = sum(WEIGHTS[stage] for stage in (Stage.pulling, Stage.planning))
    assert abs(course.fraction - (before + (1 - before) * 0.98 * 12 / 44)) < 1e-9
    course.enter(Stage.certifying, 19.0)
    course.advance(1, 2)
    assert abs(course.fraction - (before + (1 - before) * 0.98 * 29 / 44)) < 1e-9


def test_a_long_certification_is_expected_before_it_has_told_anything() -> None:
    course = _compressed(10.0)
    course.enter(Stage.certifying, 19.0)
    at_once, later, overdue = (course.eta_seconds(at) for at in (19.0, 29.0, 79.0))
    assert at_once is not None and later is not None and overdue is not None
    assert abs(at_once - 30.0 * 14 / 14) < 1.0
    assert abs(at_once - later - 10.0) < 1e-9
    assert 0 < overdue < 10.0


def test_a_job_that_is_slower_than_expected_takes_longer_to_its_end_too() -> None:
    quick, slow = _compressed(10.0), _compressed(20.0)
    for course, at in ((quick, 19.0), (slow, 29.0)):
        course.enter(Stage.certifying, at)
    quick_eta, slow_eta = quick.eta_seconds(19.0), slow.eta_seconds(29.0)
    assert quick_eta is not None and slow_eta is not None and 1.5 * quick_eta < slow_eta < 2 * quick_eta


def test_what_a_stage_has_told_of_itself_counts_more_than_what_was_expected() -> None:
    course = Course()
    course.enter(Stage.loading, 0.0)
    course.expect({"compressing": 100.0}, 0.0)
    course.enter(Stage.compressing, 1.0)
    course.advance(1, 2)
    eta = course.eta_seconds(11.0)
    assert eta is not None and abs(eta - 10.0) < 1e-9


def test_a_stage_that_comes_before_its_usual_place_does_not_count_what_is_yet_to_come() -> None:
    course = Course()
    course.enter(Stage.loading, 0.0)
    course.expect({"training": 10.0, "exporting": 1.0, "compressing": 60.0, "certifying": 29.0}, 0.0)
    before = course.fraction
    course.enter(Stage.training, 0.0)
    course.advance(5, 5)
    course.enter(Stage.exporting, 10.0)
    course.enter(Stage.loading, 11.0)
    assert abs(course.fraction - (before + (1 - before) * 0.98 * 11 / 100)) < 1e-9
    course.enter(Stage.compressing, 11.0)
    eta = course.eta_seconds(11.0)
    assert eta is not None and abs(eta - 89.0) < 1e-9


def test_a_teacher_and_bits_that_are_allotted_share_one_stage() -> None:
    course = Course()
    course.enter(Stage.loading, 0.0)
    course.expect({"teaching": 10.0, "training": 10.0, "allotting": 5.0}, 0.0)
    before = course.fraction
    course.enter(Stage.calibrating, 0.0)
    course.advance(1, 1)
    assert abs(course.fraction - (before + (1 - before) * 0.98 * 15 / 25)) < 1e-9
