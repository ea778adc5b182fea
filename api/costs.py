"""What a spec would cost on a model of that shape: memory of all its steps, and their seconds together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from api.learning import text_bytes_of
from api.service import Service
from api.teaching import Leg
from api.tensors import Tensor
from jobs import history
from squeeze.costs.distillation_memory import needed_to_distill, stored_bytes
from squeeze.costs.distillation_work import Lessons, at_length, counted_distillation, lessons
from squeeze.costs.memory import PROCESS_BYTES, needed, sketch_bytes
from squeeze.costs.merging_work import counted_merging, merging_bytes
from squeeze.costs.pace import duration
from squeeze.costs.slimming_work import counted_slimming, looking_bytes, slimming_memory
from squeeze.costs.trainable import Learned, learned
from squeeze.costs.training_memory import needed_to_train
from squeeze.costs.training_work import counted_training, tokens_to_train
from squeeze.costs.work import Count, counted
from squeeze.names import Format
from squeeze.shapes.model import Shape, shape_of
from squeeze.specs.chains import factored_before
from squeeze.specs.choosing import supposed
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.distillation import Distill
from squeeze.steps.every import Step
from squeeze.steps.factoring import SVD
from squeeze.steps.finetuning import Finetune, QLoRA
from squeeze.steps.merging import Merge
from squeeze.steps.quantization import RTN
from squeeze.steps.slimming import Slim
from squeeze.steps.sparsifying import Sparsify, Zeroes
from squeeze.steps.training import Train


@dataclass(frozen=True)
class _Cost:
    """Of a step. whole, least: host memory. stays: of it, what the process still has in the next step. counts: work by
    stage; None where that can't be counted.
    """

    whole: int = 0
    least: int = 0
    stays: int = 0
    counts: dict[str, Count] | None = field(default_factory=dict)

    def then(self, other: "_Cost") -> "_Cost":
        """With the step that follows."""
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = _together(self.counts, other.counts)
        whole, least = other.whole + self.stays, other.least + self.stays
        return _Cost(max(self.whole, whole), max(self.least, least), other.stays, counts)

    def uncertified(self) -> "_Cost":
        """Of a round that another follows."""
        counts = self.counts and {stage: each for stage, each in self.counts.items() if stage != "certifying"}
        return replace(self, counts=counts)


class Costs:
    """Of a job, round by round. records: that are trained on, as far as that is known."""

    def __init__(self, service: Service, project: str, spec: JobSpec, legs: Sequence[Leg], records: int | None) -> None:
        self._service, self._project, self._spec, self._legs = service, project, spec, legs
        self._text_bytes = text_bytes_of(service, project, spec)
        self._lessons = [self._lessons_of(leg, records) for leg in legs]

    def told(self, result_bytes: dict[Format, int]) -> dict[str, Any]:
        """`host_bytes`, `least_host_bytes` and `seconds` of a plan; nothing where the headers show no blocks, and of
        what can't be counted: the time of examples of unknown number.
        """
        if not all(shape_of_model(*its).blocks for leg in self._legs for its in (_begun(leg), _made(leg))):
            return {}
        found: dict[str, Any] = {}
        cost = _Cost()
        for leg, told in zip(self._legs, self._lessons, strict=True):
            cost = self._of_round(leg, told, result_bytes if leg is self._legs[-1] else {}, cost, found)
        found |= {"host_bytes": cost.whole, "least_host_bytes": cost.least}
        if cost.counts is not None:
            gpu = self._spec.limits.gpus > 0 or None  # without the wish, whatever worker is free takes it
            method = self._spec.steps[-1].method
            with self._service.database.read() as session:
                past = history.finished(session, method, gpu=gpu)
            blocks = len(shape_of_model(*_begun(self._legs[0])).blocks)
            found["seconds"] = duration(cost.counts, blocks, method, past, gpu=bool(gpu))
        return found

    def kept_bytes(self) -> int:
        """On the worker's disk: what each round keeps, and the whole model that it makes for the next."""
        kept = (_kept_bytes(leg, told) for leg, told in zip(self._legs, self._lessons, strict=True))
        wholes = sum(2 * _elements(leg.made.tensors) for leg in self._legs[:-1])
        # Where factors learned, these, and the plain model beside them, which may not be asked for.
        learned = (leg for leg in self._legs if any(map(self._factored, leg.part.spec.steps)))
        return sum(kept) + wholes + sum(4 * _elements(leg.made.tensors) for leg in learned)

    def _factored(self, step: Step) -> bool:
        """Whether a step learns in the place of factors."""
        return isinstance(step, Train) and any(step is one for one in factored_before(self._spec.steps))

    def _of_round(
        self, leg: Leg, told: Lessons | None, result_bytes: dict[Format, int], cost: _Cost, found: dict[str, Any]
    ) -> _Cost:
        """With what came before. found: what the plan says; what is chosen for the user is added."""
        spec, own = leg.part.spec, shape_of_model(*_begun(leg))
        shape, teacher = shape_of_model(*_made(leg), _ignored(spec)), shape_of_model(*_begun(self._legs[0]))
        goes_on = leg is not self._legs[-1]
        for step in spec.steps:
            formats = result_bytes if step is spec.steps[-1] else {}
            one = _Cost()
            if isinstance(step, Finetune):
                parameters, learns = _elements(leg.made.tensors), shape_of_model(*_made(leg))
                spec, step, found["chosen"] = supposed(spec, step, parameters, own.positions)  # noqa: PLW2901
                one = _finetuning(spec, step, learns, self._learned(leg, step), formats, self._text_bytes)
            elif isinstance(step, Distill):
                student, known = shape_of_model(*_made(leg)), self._learned(leg, step)
                one = _distilling(spec, step, teacher, student, known, formats, told, self._text_bytes)
            elif isinstance(step, Merge):
                largest = max((tensor.elements for tensor in leg.tensors.values()), default=0)
                one = _merging(spec, step, own, largest, formats)
            elif isinstance(step, Slim):
                whole, least = slimming_memory(own, spec, step, shape, formats)
                one = _Cost(whole, least, 0, counted_slimming(own, spec, step, self._text_bytes))
            elif isinstance(step, Compress):
                memory = needed(shape, spec.model_copy(update={"steps": (step,)}), formats)
                last = step is spec.steps[-1]  # which is counted together with those of its kind before
                one = _Cost(memory.whole, memory.least, 0, counted(shape, spec) if last else {})
            cost = cost.then(one.uncertified() if goes_on else one)
        return cost

    def _learned(self, leg: Leg, step: Train) -> Learned:
        before = self._spec.steps[: leg.part.first]  # what zeroes or factors comes last in its round
        known = replace(learned_of(step, *_made(leg)), factored=any(isinstance(one, SVD) for one in before))
        return known.of_zeroed() if any(isinstance(one, Zeroes) for one in before) else known

    def _lessons_of(self, leg: Leg, records: int | None) -> Lessons | None:
        """What a distillation learns from, where that is known."""
        spec = leg.part.spec
        step = next((step for step in spec.steps if isinstance(step, Distill)), None)
        if step is None:
            return None
        teacher, student = shape_of_model(*_begun(self._legs[0])), shape_of_model(*_made(leg))
        _, length = at_length(spec, teacher, student)
        return lessons(spec, step, length, self._text_bytes, records)


def shape_of_model(config: dict[str, Any], tensors: dict[str, Tensor], ignored: list[str] | None = None) -> Shape:
    """ignored: patterns of linears that are not compressed."""
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    dtype = max(dtypes, key=dtypes.__getitem__, default="BF16")
    return shape_of(config, {name: tensor.shape for name, tensor in tensors.items()}, dtype, ignored or [])


def learned_of(step: Train, config: dict[str, Any], tensors: dict[str, Tensor]) -> Learned:
    return learned(step, config, {name: tensor.shape for name, tensor in tensors.items()})


def _kept_bytes(leg: Leg, told: Lessons | None) -> int:
    """Of a training two checkpoints, a byte a weight of a base that is rounded for it, and every whole model that a
    next step goes on with; of a distillation the student as it begins, and what is kept of the teacher.
    """
    spec = leg.part.spec
    step = next((step for step in spec.steps if isinstance(step, Train)), None)
    size, begun = (2 * _elements(its) for its in (leg.made.tensors, leg.tensors))
    merged = begun if isinstance(spec.steps[0], Merge) and len(spec.steps) > 1 else 0  # otherwise it is the result
    # Zeros or factors are kept, and whole for a step that follows.
    plain = [step for step in spec.steps if isinstance(step, Sparsify | SVD)]
    merged += sum(size * (1 if one is spec.steps[-1] else 2) for one in plain)
    merged += sum(sketch_bytes(shape_of_model(*_made(leg), list(one.ignore)), one) for one in plain)
    if isinstance(first := spec.steps[0], Slim):
        merged += size * (len(spec.steps) > 1) + looking_bytes(shape_of_model(*_begun(leg)), spec, first)
    if step is None:
        return merged
    known = learned_of(step, *_made(leg))
    whole = size if step is not spec.steps[-1] else 0
    taught = 0
    if isinstance(step, Distill):
        taught = size if step.student.layers is not None else 0
        taught += stored_bytes(step, shape_of_model(*_begun(leg)), told)
    codes = known.rounded if isinstance(step, QLoRA) and step.base == "gptq" else 0
    return 2 * (4 * (known.parameters + known.scores) + known.state_bytes) + codes + whole + merged + taught


def _finetuning(
    spec: JobSpec, step: Finetune, shape: Shape, known: Learned, formats: dict[Format, int], text_bytes: int | None
) -> _Cost:
    memory = needed_to_train(shape, spec, step, known, formats, text_bytes or 0)
    length = min(spec.data.length, shape.positions or spec.data.length)
    tokens = tokens_to_train(spec, step, length, text_bytes)
    counts = None
    if tokens is not None:
        counts = counted_training(shape, spec, step, known, tokens, last=step is spec.steps[-1])
    return _Cost(memory.whole, memory.whole, memory.process - PROCESS_BYTES, counts)


def _distilling(
    spec: JobSpec,
    step: Distill,
    teacher: Shape,
    student: Shape,
    known: Learned,
    formats: dict[Format, int],
    told: Lessons | None,
    text_bytes: int | None,
) -> _Cost:
    memory = needed_to_distill(teacher, student, spec, step, known, formats, told, text_bytes or 0)
    counts = None
    if told is not None:
        last = step is spec.steps[-1]
        counts = counted_distillation(teacher, student, spec, step, known, told, last=last)
    return _Cost(memory.whole, memory.least, memory.process - PROCESS_BYTES, counts)


def _merging(spec: JobSpec, step: Merge, shape: Shape, largest: int, formats: dict[Format, int]) -> _Cost:
    """The merged model runs beside the base, block by block, as one does whose blocks are rounded. largest: elements of
    the largest tensor.
    """
    plain = spec.model_copy(update={"steps": (RTN(method="rtn"),)})
    measured, merging = needed(shape, plain, formats), merging_bytes(largest)
    return _Cost(max(merging, measured.whole), max(merging, measured.least), 0, counted_merging(shape, spec, step))


def _begun(leg: Leg) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return leg.config, leg.tensors


def _made(leg: Leg) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return leg.made.config, leg.made.tensors


def _elements(tensors: Mapping[str, Tensor]) -> int:
    return sum(one.elements for one in tensors.values())


def _ignored(spec: JobSpec) -> list[str]:
    return [pattern for step in spec.compressing[-1:] for pattern in step.ignore]


def _together(first: dict[str, Count], second: dict[str, Count]) -> dict[str, Count]:
    none = Count()
    return {
        stage: Count(
            first.get(stage, none).fixed + second.get(stage, none).fixed,
            first.get(stage, none).blocks + second.get(stage, none).blocks,
        )
        for stage in (*first, *(stage for stage in second if stage not in first))
    }
