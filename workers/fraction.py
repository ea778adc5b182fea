"""How far a whole job is and how long it will yet take, from the stage that it is in and how far that stage is."""

from collections.abc import Mapping

from squeeze.objects import Stage

# Shares of a usual job's time, in the order in which the stages come, for as long as nothing better is known.
# Evaluation happens in the pass that compresses.
WEIGHTS: dict[Stage, float] = {
    Stage.pulling: 0.15,
    Stage.planning: 0.01,
    Stage.loading: 0.02,
    Stage.merging: 0.05,
    Stage.calibrating: 0.07,
    Stage.training: 0.10,
    Stage.compressing: 0.35,
    Stage.evaluating: 0.05,
    Stage.exporting: 0.05,
    Stage.certifying: 0.10,
    Stage.uploading: 0.05,
}
UPLOADING_SHARE = 0.02  # of the rest of a job whose other stages are known

# By the names that reports give them; bits are allotted while the text is looked at, which is what a teacher does too.
_STAGES = {
    "loading": Stage.loading,
    "merging": Stage.merging,
    "teaching": Stage.calibrating,
    "training": Stage.training,
    "allotting": Stage.calibrating,
    "compressing": Stage.compressing,
    "evaluating": Stage.evaluating,
    "exporting": Stage.exporting,
    "certifying": Stage.certifying,
}
_ETA_AFTER = 0.03  # earlier, the elapsed time says nothing about the rest
_PACE_AFTER_SECONDS = 2.0  # of expected work, after which the job's own pace is believed
_TOLD_SHARE = 0.05  # of a stage, after which what has been told of it is believed
_MOST_PACE = 3.0  # a machine that is slow in one stage is slow in the next; one that is quick need not be
_LEAST_LEFT = 0.1  # of the time that a stage has taken which tells nothing and has had what it was expected to take


class Course:
    """The way of one attempt through its stages. The fraction never goes back, even where a stage comes twice.

    Times are seconds since the attempt began.
    """

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.fraction = 0.0
        self._weights = dict(WEIGHTS)
        self._expected: dict[Stage, float] = {}
        self._behind: float | None = None  # of the whole, by stages that have ended, once their shares are known
        self._share = 0.0  # of the present stage that is done
        self._entered = 0.0
        self._done_expected = self._done_taken = 0.0  # seconds of the stages that have ended since they were expected

    def expect(self, seconds: Mapping[str, float], at: float) -> None:
        """What each stage from the present one on will likely take, by the names that reports have for them."""
        known: dict[Stage, float] = {}
        for name, each in seconds.items():
            if name in _STAGES:  # a distillation may teach, and the step after it allot
                known[_STAGES[name]] = known.get(_STAGES[name], 0.0) + each
        rest, whole = 1.0 - self.fraction, sum(known.values())
        if self.stage is None or whole <= 0:
            return
        self._expected, self._entered, self._behind = known, at, self.fraction
        self._weights = dict.fromkeys(WEIGHTS, 0.0)
        for stage, each in known.items():
            self._weights[stage] += rest * (1 - UPLOADING_SHARE) * each / whole
        self._weights[Stage.uploading] = rest * UPLOADING_SHARE

    def enter(self, stage: Stage, at: float) -> None:
        if self.stage in self._expected and stage != self.stage:
            self._done_expected += self._expected.pop(self.stage)
            self._done_taken += at - self._entered
        if stage != self.stage:
            if self.stage is not None and self._behind is not None:
                self._behind += self._weights[self.stage]
                self._weights[self.stage] = 0.0  # one that comes again is part of what it was expected to take
            self._entered, self._share = at, 0.0
        self.stage = stage
        self._reach(0.0)

    def advance(self, done: int, total: int) -> None:
        if total > 0:
            self._share = min(1.0, done / total)
            self._reach(self._share)

    def eta_seconds(self, elapsed_seconds: float) -> float | None:
        """None where it is too early to tell."""
        if not self._expected:
            return elapsed_seconds * (1.0 - self.fraction) / self.fraction if self.fraction >= _ETA_AFTER else None
        later = sum(each for stage, each in self._expected.items() if stage != self.stage)
        here = self._expected.get(self.stage, 0.0) if self.stage else 0.0
        taken, pace = elapsed_seconds - self._entered, self._pace()
        if self._share >= _TOLD_SHARE:
            left = taken * (1.0 - self._share) / self._share
            pace = _bounded((self._done_taken + taken + left) / (self._done_expected + here)) if here else pace
        else:
            left = max(pace * here - taken, _LEAST_LEFT * taken)
        return left + pace * later

    def _pace(self) -> float:
        """By which the stages that have ended took longer than expected, if they did."""
        return _bounded(self._done_taken / self._done_expected) if self._done_expected >= _PACE_AFTER_SECONDS else 1.0

    def _reach(self, share: float) -> None:
        if self.stage is None:
            return
        stages = list(self._weights)
        passed = stages[: stages.index(self.stage)]
        before = sum(self._weights[stage] for stage in passed) if self._behind is None else self._behind
        # 1 is only for a job that has been published.
        self.fraction = min(0.999, max(self.fraction, before + self._weights[self.stage] * share))


def _bounded(pace: float) -> float:
    return min(max(pace, 1.0), _MOST_PACE)
