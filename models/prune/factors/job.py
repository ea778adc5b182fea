"""A step that factors before one that quantizes: the factors multiplied out, a plain model, and what is told of it."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from models.closing import with_before
from models.files.checkpoint import SourceModel, open_or_convert
from models.formats import layout
from models.job import Inputs
from models.progress import Notify
from models.prune.factors.factoring import multiplied_out
from models.prune.job import FORMAT, Before
from models.quantize.job import compressed
from models.resources import Clock
from models.streaming.team import Team
from models.work import work_of
from squeeze.objects import Stage
from squeeze.reports.report import Factoring, Report
from squeeze.steps.factoring import SVD


@dataclass(frozen=True)
class Done:
    """source: what was factored. whole: the plain model's directory. factors: its part of the report. work: operations
    by stage.
    """

    source: SourceModel
    whole: Path
    factors: Factoring
    warnings: list[str]
    work: dict[str, float]


def factored(inputs: Inputs, step: SVD, clock: Clock, notify: Notify, team: Team) -> Done:
    """Factors, resuming where an earlier attempt stopped, and measures the result against what it was."""
    alone = inputs.spec.model_copy(update={"steps": (step,), "formats": (FORMAT,)})
    with clock.stage("loading"):
        source = open_or_convert(inputs.model, inputs.work / "source")
        following = work_of(source, inputs.spec, inputs.spec.compressing[-1])
    begun = compressed(replace(inputs, spec=alone), clock, Before(notify, following), team)
    assert begun.factors is not None, "the step factors"
    model, work = begun.codes.model, {name: each for name, each in begun.begun.work.items() if name != "certifying"}
    # A directory that is there is whole, and as long as nobody touches it, the next step resumes as well.
    whole = inputs.work / f"merged-{sha256((model.directory / 'fingerprint').read_bytes()).hexdigest()[:16]}"
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        if not whole.exists():
            layout(FORMAT).write(source, model, whole, notify)
    quality = begun.measured.quality if begun.measured is not None else None
    factors = begun.factors.model_copy(update={"quality": quality})
    return Done(source, whole, factors, begun.begun.warnings, work)


def for_what_follows(inputs: Inputs, done: Done) -> Inputs:
    """What the next step is given; what it makes is compared with the model before either."""
    return replace(inputs, model=done.whole, original=done.source.path)


def added(report: Report, inputs: Inputs, done: Done) -> Report:
    """The report of what came after, with the factors and the model that it began with."""
    warnings = [multiplied_out(done.factors), *done.warnings]
    return with_before(report, inputs, done.source, done.work, warnings, factoring=done.factors)
