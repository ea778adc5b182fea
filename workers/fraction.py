"""How far a whole job is, from the stage that it is in and how far that stage is."""

from squeeze.objects import Stage

# Shares of a usual job's time, in the order in which the stages come. Evaluation happens in the pass that compresses.
WEIGHTS: dict[Stage, float] = {
    Stage.pulling: 0.15,
    Stage.planning: 0.01,
    Stage.loading: 0.02,
    Stage.calibrating: 0.07,
    Stage.training: 0.10,
    Stage.compressing: 0.40,
    Stage.evaluating: 0.05,
    Stage.exporting: 0.05,
    Stage.certifying: 0.10,
    Stage.uploading: 0.05,
}

_ETA_AFTER = 0.03  # earlier, the elapsed time says nothing about the rest


class Course:
    """The way of one attempt through its stages. The fraction never goes back, even where a stage comes twice."""

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.fraction = 0.0

    def enter(self, stage: Stage) -> None:
        self.stage = stage
        self._reach(0.0)

    def advance(self, done: int, total: int) -> None:
        if total > 0:
            self._reach(min(1.0, done / total))

    def eta_seconds(self, elapsed_seconds: float) -> float | None:
        if self.fraction < _ETA_AFTER:
            return None
        return elapsed_seconds * (1.0 - self.fraction) / self.fraction

    def _reach(self, share: float) -> None:
        if self.stage is None:
            return
        before = 0.0
        for stage, weight in WEIGHTS.items():
            if stage == self.stage:
                # 1 is only for a job that has been published.
                self.fraction = min(0.999, max(self.fraction, before + weight * share))
                return
            before += weight
