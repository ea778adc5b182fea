"""Seconds that a job will take: its counted work (`squeeze.costs.work`) over the speed that finished jobs attained.

Speeds are told apart by stage, and of the stages that compress by method. Where no job has finished yet, those of the
reference machine serve: they were measured by `benchmarks/pace.py` and are committed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median

from squeeze.costs.work import STAGES, Count
from squeeze.objects import Duration

REFERENCE_MACHINE = "one core of an AMD EPYC (AVX-512 with bfloat16)"

# Operations of `squeeze.costs.work` in a processor second of the reference machine, on a random Llama of width 768.
REFERENCE: dict[str, float] = {
    "loading": 1.4e11,
    "merging": 4.0e10,
    "teaching": 6.0e10,  # in float32, as on any CPU, like what follows
    "training": 7.0e10,
    "evaluating": 1.3e11,
    "exporting": 1.0e11,
    "certifying": 1.1e11,
}
REFERENCE_METHODS: dict[str, float] = {  # of the stages that compress
    "rtn": 1.7e11,
    "gptq": 1.4e11,
    "awq": 1.1e11,
    "autoround": 1.7e11,
    "qat": 1.4e11,
    "hqq": 1.6e11,
    "smoothquant": 1.3e11,
    "fp8": 4.8e10,
    "mxfp4": 7.7e10,
    "nvfp4": 3.3e10,
    "nf4": 9.1e10,
    "int8": 1.4e11,
    "bf16": 9.4e10,
    "fp16": 9.4e10,
    "kquant": 1.2e11,
    # These beside gptq, in turn on a machine that did other things too: their ratios to it, not their seconds, count.
    "magnitude": 9.8e10,
    "wanda": 1.5e11,
    "sparsegpt": 9.4e10,
    "svd": 2.0e11,
    "depth": 1.9e11,
    "width": 1.7e11,
}
ROUNDS_BASES = "gptq"  # what compresses where the method itself trains

FOREIGN_FACTOR = 3.0  # by which another machine may well be quicker or slower
LEAST_SPREAD = 1.25  # by which two jobs alike differ on one machine that does other things too
NEAREST = 12  # jobs in size that a speed is taken from


@dataclass(frozen=True)
class Past:
    """What a finished job did. seconds: by stage. work: operations by stage."""

    method: str
    device: str
    seconds: Mapping[str, float]
    work: Mapping[str, float]


def reference_seconds(method: str, stage: str, operations: float) -> float:
    """What so much of a stage's work takes the reference machine."""
    if stage not in ("allotting", "compressing"):
        return operations / REFERENCE[stage]
    return operations / REFERENCE_METHODS.get(method, REFERENCE_METHODS[ROUNDS_BASES])


def expected(work: Mapping[str, float], method: str, past: Sequence[Past]) -> dict[str, float]:
    """Likely seconds of each stage. work: operations by stage. past: the newest first."""
    factors = _factors(work, _alike(method, past))
    return {stage: factors[stage] * reference_seconds(method, stage, each) for stage, each in work.items()}


def duration(counts: Mapping[str, Count], blocks: int, method: str, past: Sequence[Past], *, gpu: bool) -> Duration:
    """How long a job takes, and how that is known.

    counts: by stage. past: finished jobs of the workers that may take this one, the newest first. gpu: it will be
    worked on by a GPU for certain.
    """
    alike = _alike(method, past)
    work = {stage: count.whole for stage, count in counts.items()}
    stages = expected(work, method, past)
    likely = sum(stages.values())
    fixed = sum(stages[stage] * count.fixed / count.whole for stage, count in counts.items() if count.whole)
    if alike:
        low, high = _range(work, method, alike)
    else:
        low, high = 0.0 if gpu else 1 / FOREIGN_FACTOR, FOREIGN_FACTOR
    return Duration(
        low=_rounded(likely * low),
        likely=_rounded(likely),
        high=_rounded(likely * high),
        fixed=_rounded(fixed),
        per_block=_rounded((likely - fixed) / blocks if blocks else 0.0),
        stages={stage: _rounded(each) for stage, each in stages.items()},
        basis=_basis(method, _nearest(work, alike), gpu),
    )


def _alike(method: str, past: Sequence[Past]) -> list[Past]:
    """Jobs of the method on the device that finished a job last; where it has none of the method, all of its jobs."""
    own = [one for one in past if one.device == past[0].device and one.work.keys() & one.seconds.keys()]
    return [one for one in own if one.method == method] or own


def _nearest(work: Mapping[str, float], past: Sequence[Past]) -> list[Past]:
    return sorted(past, key=lambda one: _distance(work, one))[:NEAREST]


def _distance(work: Mapping[str, float], one: Past) -> float:
    """Between the sizes of two jobs, as the logarithm of their ratio."""
    return abs(log(max(sum(one.work.values()), 1.0) / max(sum(work.values()), 1.0)))


def _factors(work: Mapping[str, float], past: Sequence[Past]) -> dict[str, float]:
    """By which each stage takes longer than on the reference machine."""
    nearest = _nearest(work, past)
    whole = median([_whole_factor(one) for one in nearest]) if nearest else 1.0
    factors = {}
    for stage in work:
        own = [one.seconds[stage] / each for one in nearest if (each := _reference_of(one, stage))]
        factors[stage] = median(own) if own else whole
    return factors


def _reference_of(one: Past, stage: str) -> float:
    if stage not in one.seconds or stage not in one.work:
        return 0.0
    return reference_seconds(one.method, stage, one.work[stage])


def _whole_factor(one: Past) -> float:
    known = [stage for stage in STAGES if _reference_of(one, stage)]
    return sum(one.seconds[stage] for stage in known) / sum(_reference_of(one, stage) for stage in known)


def _range(work: Mapping[str, float], method: str, alike: Sequence[Past]) -> tuple[float, float]:
    """Factors of the likely seconds: as far as the jobs differed among themselves, wider where none was of the size."""
    nearest = _nearest(work, alike)
    factors = [_whole_factor(one) for one in nearest]
    middle = median(factors)
    gap = exp(_distance(work, nearest[0]) / 4)
    spread = LEAST_SPREAD * gap * (1.0 if all(one.method == method for one in nearest) else 2.0)
    return min(factors) / middle / spread, max(factors) / middle * spread


def _basis(method: str, nearest: Sequence[Past], gpu: bool) -> str:
    if not nearest:
        faster = "a GPU will be quicker, by how much is not known" if gpu else "yours may differ by a factor of several"
        return f"from the reference machine, {REFERENCE_MACHINE}; {faster}"
    jobs = f"{len(nearest)} job{'' if len(nearest) == 1 else 's'}"
    of = method if all(one.method == method for one in nearest) else "other methods"
    return f"from {jobs} of {of} on this service's {nearest[0].device}"


def _rounded(seconds: float) -> float:
    return round(seconds, 3 if seconds < 10 else 1)
