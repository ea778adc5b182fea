"""A step that zeroes weights before one that quantizes: the pruned model in its own type, and what the report says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from models.closing import with_before
from models.files.checkpoint import SourceModel, open_or_convert
from models.formats import layout
from models.job import Inputs
from models.progress import Notify
from models.prune.zeroing.counting import left_in, share_kept
from models.quantize.job import compressed
from models.resources import Clock
from models.streaming.team import Team
from models.work import work_of
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Report, Sparsity
from squeeze.steps.sparsifying import Sparsify

FORMAT: Format = "safetensors"


@dataclass(frozen=True)
class Done:
    """source: what was pruned. whole: the pruned model's directory. zeros: its part of the report. counts: of zeros,
    by layer. work: operations by stage.
    """

    source: SourceModel
    whole: Path
    zeros: Sparsity
    counts: dict[str, float]
    warnings: list[str]
    work: dict[str, float]


def pruned(inputs: Inputs, step: Sparsify, clock: Clock, notify: Notify, team: Team) -> Done:
    """Prunes, resuming where an earlier attempt stopped, and measures the result against what it was."""
    alone = inputs.spec.model_copy(update={"steps": (step,), "formats": (FORMAT,)})
    with clock.stage("loading"):
        source = open_or_convert(inputs.model, inputs.work / "source")
        following = work_of(source, inputs.spec, inputs.spec.compressing[-1])
    begun = compressed(replace(inputs, spec=alone), clock, Before(notify, following), team)
    model, work = begun.codes.model, {name: each for name, each in begun.begun.work.items() if name != "certifying"}
    # A directory that is there is whole, and as long as nobody touches it, the next step resumes as well.
    whole = inputs.work / f"pruned-{sha256((model.directory / 'fingerprint').read_bytes()).hexdigest()[:16]}"
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        if not whole.exists():
            layout(FORMAT).write(source, model, whole, notify)
        zeros = begun.zeros(whole)
        assert zeros is not None, "it was a step that zeroes weights"
    counts = {name: site.rows * site.columns * model.schemes[name].sparsity for name, site in model.sites.items()}
    if begun.measured is not None:
        zeros = zeros.model_copy(update={"quality": begun.measured.quality})
    return Done(source, whole, zeros, counts, begun.begun.warnings, work)


def for_what_follows(inputs: Inputs, done: Done) -> Inputs:
    """What the next step is given; what it makes is compared with the model before either."""
    return replace(inputs, model=done.whole, original=done.source.path)


def added(report: Report, inputs: Inputs, done: Done) -> Report:
    """The report of what came after, with the zeros and the model that it began with."""
    kept = share_kept(report, done.counts)
    warnings = [left_in(done.zeros, kept), *done.warnings]
    zeros = done.zeros.model_copy(update={"zeros_kept": kept})
    return with_before(report, inputs, done.source, done.work, warnings, sparsity=zeros)


class Before:
    """Tells of this step as of a part of the job. The next one counts as what comes last, until it tells of itself."""

    def __init__(self, notify: Notify, following: Mapping[str, float]) -> None:
        self.stage, self.advance, self.event, self.kept = notify.stage, notify.advance, notify.event, notify.kept
        self._notify, self._following = notify, sum(following.values())

    def expect(self, work: Mapping[str, float]) -> None:
        self._notify.expect({**work, "certifying": self._following})
