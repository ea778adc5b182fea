"""A job that prunes and trains in turn, round after round: each goes on with what the one before made.

A round that was finished is kept in the work directory, whole, and not done again by the next attempt.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models.files.checkpoint import open_model
from models.files.disk import write_whole
from models.job import Inputs, Outcome, result_of
from models.progress import Notify
from models.prune.factors.handed import HandedFactors
from models.train.factors import FACTORS
from models.work import summed
from squeeze import __version__
from squeeze.errors import SqueezeError
from squeeze.reports.report import Report, Round
from squeeze.specs.rounds import Round as Part
from squeeze.steps.distillation import Distill
from squeeze.steps.factoring import SVD
from squeeze.texts.domains import takes_something

MARK, REPORT = "mark", "report.json"
Run = Callable[[Inputs, Notify], Outcome]


@dataclass(frozen=True)
class _Standing:
    """After some rounds. model: what they made, of which `mark` tells it from any other. teacher: the model before
    anything was taken from it; None: nothing was taken yet. factors: of its linears, where they were factored.
    """

    model: Path
    mark: str
    teacher: Path | None
    factors: HandedFactors | None = None
    told: tuple[Report, ...] = ()


def run_in_rounds(inputs: Inputs, rounds: Sequence[Part], run: Run, notify: Notify) -> Outcome:
    """run: the steps of one round, with inputs of their own."""
    standing = _Standing(inputs.model, _begun(inputs), None)
    for number, part in enumerate(rounds[:-1]):
        left = len(rounds) - 1 - number
        standing = _one(inputs, part, number, standing, run, _Part(notify, part, left))
    last = rounds[-1]
    with counted_from(last.first):
        outcome = run(_inputs_of(inputs, last, len(rounds) - 1, standing, inputs.out), _Part(notify, last, 0))
    report = _together(outcome.report, inputs, rounds, standing.told)
    write_whole(inputs.out / REPORT, report.model_dump_json(indent=2) + "\n")
    return Outcome(outcome.directories, report, result_of(report, outcome.directories))


@contextmanager
def counted_from(first: int) -> Iterator[None]:
    """Errors that name a step by its number in the round name it by that in the job."""
    try:
        yield
    except SqueezeError as error:
        if error.param and error.param.startswith("steps."):
            number, _, field = error.param.removeprefix("steps.").partition(".")
            error.param = f"steps.{first + int(number)}.{field}"
        raise


def _one(inputs: Inputs, part: Part, number: int, standing: _Standing, run: Run, notify: "_Part") -> _Standing:
    """A round before the last, unless an earlier attempt finished it."""
    out = inputs.work / f"round-{number}" / "out"
    mark = _after(standing.mark, part)
    if not (out / MARK).is_file() or (out / MARK).read_text(encoding="utf-8") != mark:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with counted_from(part.first):
            run(_inputs_of(inputs, part, number, standing, out), notify)
        write_whole(out / MARK, mark)
    else:
        notify.event("info", f"{notify.name} was done by an earlier attempt")
    report = Report.model_validate_json((out / REPORT).read_text(encoding="utf-8"))
    whole, teacher = out / "safetensors", standing.teacher
    if teacher is None and any(takes_something(step) for step in part.spec.steps):
        teacher = standing.model
    return _Standing(
        whole, mark, teacher, _factors(inputs.work / f"round-{number}", part, report), (*standing.told, report)
    )


def _factors(work: Path, part: Part, report: Report) -> HandedFactors | None:
    """As the step that factored left them in the work directory of its round, or one that trained in its own."""
    told = report.factoring
    if told is None:
        return None
    factoring = next((step for step in part.spec.steps if isinstance(step, SVD)), None)
    directory = work / (FACTORS if factoring is None else factoring.kind)
    return HandedFactors(directory, told.model_copy(update={"quality": told.quality or report.quality}))


def _inputs_of(inputs: Inputs, part: Part, number: int, standing: _Standing, out: Path) -> Inputs:
    last = part.spec.steps[-1] is inputs.spec.steps[-1] and part.first + len(part.spec.steps) == len(inputs.spec.steps)
    own = replace(inputs, spec=part.spec, out=out, work=inputs.work / f"round-{number}", goes_on=not last)
    own.work.mkdir(exist_ok=True)
    if number == 0:
        return own
    own = replace(own, factors=standing.factors)
    digest = standing.mark if inputs.identity is not None else None
    if standing.teacher is not None and isinstance(part.spec.steps[0], Distill):
        own = replace(own, student=standing.model, student_name="what the steps before made", student_digest=digest)
        if standing.teacher == inputs.model:
            return own
        return replace(own, model=standing.teacher, revision=None, digest=digest)
    return replace(own, model=standing.model, revision=None, digest=digest, teacher=standing.teacher)


def _begun(inputs: Inputs) -> str:
    """Of all that decides the first round, but for its steps."""
    written = sorted([file.name, file.stat().st_mtime_ns] for file in inputs.model.iterdir() if file.is_file())
    parts = [
        inputs.spec.model_dump(mode="json", include={"data", "evaluation", "seed"}),
        inputs.identity or written,
        inputs.student_identity,
        [one.revision for one in inputs.merged],
        inputs.device,
        [__version__, torch.__version__],
    ]
    return _digest(parts)


def _after(mark: str, part: Part) -> str:
    return _digest([mark, [step.model_dump(mode="json") for step in part.spec.steps]])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Part:
    """Tells of a round as of a part of the job. Each of those to come counts as much as this one, as what comes last,
    until it tells of itself.
    """

    def __init__(self, notify: Notify, part: Part, left: int) -> None:
        self.stage, self.advance, self.event, self.kept = notify.stage, notify.advance, notify.event, notify.kept
        self._notify, self._left = notify, left
        last = part.first + len(part.spec.steps) - 1
        self.name = f"step {last}" if last == part.first else f"steps {part.first} to {last}"

    def expect(self, work: Mapping[str, float]) -> None:
        if self._left:
            own = {stage: each for stage, each in work.items() if stage != "certifying"}
            work = {**own, "certifying": self._left * sum(own.values())}
        self._notify.expect(work)


def _together(report: Report, inputs: Inputs, rounds: Sequence[Part], told: Sequence[Report]) -> Report:
    """The report of the last round, with what the others did, and the model that the job began with."""
    source = told[0].source
    spent, parts = report.spent, list[Round]()
    for part, one in zip(rounds, told, strict=False):
        made, factors = one.sizes[0], one.factoring
        parts.append(
            Round(
                steps=list(range(part.first, part.first + len(part.spec.steps))),
                parameters=factors.parameters_after
                if factors is not None
                else open_model(inputs.work / f"round-{len(parts)}" / "out" / made.format).parameters,
                weight_bytes=made.weight_bytes if factors is None else factors.factor_bytes,
                quality=one.quality,
                training=one.training,
                merging=one.merging,
                slimming=one.slimming,
                sparsity=one.sparsity,
                seconds=one.spent.seconds,
            )
        )
        spent = spent.model_copy(
            update={
                "seconds": summed(one.spent.seconds, spent.seconds),
                "work": summed(one.spent.work, spent.work),
                "gpu_seconds": round(one.spent.gpu_seconds + spent.gpu_seconds, 3),
                "peak_host_bytes": max(one.spent.peak_host_bytes, spent.peak_host_bytes),
                "peak_gpu_bytes": max(one.spent.peak_gpu_bytes, spent.peak_gpu_bytes),
            }
        )
    sizes = [
        size if size.ratio is None else size.model_copy(update={"ratio": source.bytes / size.weight_bytes})
        for size in report.sizes
    ]
    return report.model_copy(
        update={
            "source": source,
            "recipe": [step.model_dump(mode="json") for step in inputs.spec.steps],
            "rounds": parts,
            "sizes": sizes,
            "warnings": list(dict.fromkeys(warning for one in (report, *told) for warning in one.warnings)),
            "spent": spent,
        }
    )
