"""A job that prunes and trains in turn, as rounds: in each of them every kind of step comes once at most, in one order.

A round makes a whole model, which the next one goes on with.
"""

from dataclasses import dataclass

from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.every import Step
from squeeze.steps.merging import Merge
from squeeze.steps.quantization import Quantize
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train

_ORDER: tuple[tuple[type[object], ...], ...] = ((Merge, Slim), (Train,), (Compress,), (Quantize,))


@dataclass(frozen=True)
class Round:
    """spec: the job's, of the steps of this round alone. first: the number of its first step in the job."""

    spec: JobSpec
    first: int


def rounds_of(spec: JobSpec) -> tuple[Round, ...]:
    """Of most jobs one."""
    places = [_place(step) for step in spec.steps]
    firsts = [number for number, place in enumerate(places) if number == 0 or place <= places[number - 1]]
    ends = [*firsts[1:], len(spec.steps)]
    rounds = []
    for first, end in zip(firsts, ends, strict=True):
        formats = spec.formats if end == len(spec.steps) else ("safetensors",)
        rounds.append(Round(spec.model_copy(update={"steps": spec.steps[first:end], "formats": formats}), first))
    return tuple(rounds)


def _place(step: Step) -> int:
    return max(place for place, kinds in enumerate(_ORDER) if isinstance(step, kinds))
