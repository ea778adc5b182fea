"""The step of a job that merges: from a base and what was made from it to one model, measured against the base."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from models.certifying.certify import certify
from models.certifying.running import tokenized
from models.closing import certified, closed, linked_out, spent, with_before
from models.files.checkpoint import SourceModel, open_model, open_or_convert
from models.fingerprint import merging_fingerprint
from models.formats.directory import refuse_broken_companions
from models.job import Inputs, Outcome, libraries, params_named, size_part, source_part
from models.measuring.evaluation import Measured, measure
from models.merge.entries import Source, open_entry
from models.merge.stream import Counts, write_merged
from models.progress import Notify
from models.resources import Clock, device_name, return_free_memory
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.teamwork import compute_dtype
from models.texts.material import Material
from models.work import with_what_follows
from squeeze import __version__
from squeeze.costs.merging_work import counted_merging
from squeeze.errors import SqueezeError
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Certificate, MergedEntry, Merging, Report
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.merging import Merge
from squeeze.steps.quantization import RTN
from squeeze.steps.training import Train


@dataclass(frozen=True)
class Done:
    """base: the job's own model. whole: the merged model's directory. merging: its part of the report. measured:
    against the base, where that was wanted. work: operations by stage.
    """

    base: SourceModel
    whole: Path
    merging: Merging
    texts: Material | None
    measured: Measured | None
    warnings: list[str]
    work: dict[str, float]


def merged(inputs: Inputs, step: Merge, clock: Clock, notify: Notify) -> Done:
    """Merges, resuming where an earlier attempt stopped, and measures the result."""
    with clock.stage("loading"), params_named(inputs.spec, step):
        notify.stage(Stage.loading)
        base = open_or_convert(inputs.model, inputs.work / "source")
        refuse_broken_companions(base)
        frame = Frame(base, compute_dtype(base.dtype, torch.device(inputs.device)), torch.device(inputs.device))
        frame.refuse_misfits()
        work = {name: count.whole for name, count in counted_merging(base.shape(), inputs.spec, step).items()}
        notify.expect(with_what_follows(work, base, inputs.spec, step, inputs.calibration_text))
        entries = _opened(inputs, step, frame)
        mark = merging_fingerprint(step, inputs.spec.seed, inputs.revision, base, inputs.merged)
        texts = _texts(inputs, step, frame, notify)
        warnings = [warning for entry in entries for warning in entry.warnings]
        if texts is not None and len(inputs.spec.steps) == 1:
            warnings += texts.warnings()
        for warning in warnings:
            notify.event("warning", warning)
    with clock.stage("merging"):
        notify.stage(Stage.merging)
        whole, counts = write_merged(
            base, entries, step, inputs.spec.seed, inputs.work / "merge", mark, notify, inputs.snapshot_seconds
        )
        return_free_memory()
    warnings += _idle(inputs, counts, notify)
    result = open_model(whole)
    measured: Measured | None = None
    if texts is not None and texts.windows is not None:
        with clock.stage("evaluating"):
            notify.stage(Stage.evaluating)
            measured = _measured(inputs, frame, result, texts, mark, notify)
    chained = len(inputs.spec.steps) > 1
    quality = measured.quality if measured is not None and chained else None
    merging = Merging(
        method=step.method,
        scale=step.scale,
        elements=counts.elements,
        models=[_entry(inputs, step, entries, counts, number) for number in range(len(entries))],
        quality=quality,
    )
    return Done(base, whole, merging, texts, measured, warnings, work)


def run_merging(inputs: Inputs, step: Merge, notify: Notify) -> Outcome:
    """A job that ends with merging."""
    clock = Clock()
    done = merged(inputs, step, clock, notify)
    places = linked_out(inputs, done.whole, clock, notify)
    certificates = certified(inputs, places, partial(_certified, inputs, done, notify), clock, notify)
    return closed(inputs, places, _report(inputs, done, places, certificates, clock))


def for_what_follows(inputs: Inputs, done: Done) -> Inputs:
    """What the next step is given."""
    return replace(inputs, model=done.whole)


def added(report: Report, inputs: Inputs, done: Done) -> Report:
    """The report of what came after, with what was merged and the model that it began with."""
    parts = {"merging": done.merging, "recipe": _recipe(inputs.spec)}
    return with_before(report, inputs, done.base, done.work, done.warnings, **parts)


def _opened(inputs: Inputs, step: Merge, frame: Frame) -> list[Source]:
    entries: list[Source] = []
    for number, (wanted, named) in enumerate(zip(step.models, inputs.merged, strict=True)):
        try:
            converted = inputs.work / f"converted-{number}"
            entries.append(open_entry(frame, wanted, named, inputs.model_name, converted))
        except SqueezeError as error:
            error.param = f"models.{number}.model"
            raise
    return entries


def _texts(inputs: Inputs, step: Merge, frame: Frame, notify: Notify) -> Material | None:
    """What the merged model is measured on; None where a training follows, which measures on its own examples."""
    spec = inputs.spec
    if _trains(spec):
        return None
    return Material.of(inputs, spec, step, frame, notify)


def _measured(
    inputs: Inputs, frame: Frame, result: SourceModel, texts: Material, mark: str, notify: Notify
) -> Measured:
    """Both models' last hidden states of the evaluation windows, block by block side by side, and what they say."""
    assert texts.windows is not None, "there is something to measure on"
    other = Frame(result, compute_dtype(result.dtype, frame.device), frame.device)
    done = engine.quantize(
        other,
        RTN(method="rtn"),
        None,
        texts.windows,
        inputs.work / "measured",
        f"{mark} {texts.windows.text.sha256} {inputs.device}",
        _Within(notify),
        inputs.snapshot_seconds,
        schemes={},  # nothing is quantized: the merged model runs as it is
        reference=frame,
        memory_bytes=inputs.activation_bytes,
    )
    streams = (done.activations.original, done.activations.compressed)
    found = measure(other, texts.windows, *streams, notify, reference=frame)
    done.activations.release()
    return found


class _Within:
    """Tells of work within a stage, whose name for its own stages says nothing to the user."""

    def __init__(self, notify: Notify) -> None:
        self.expect, self.advance, self.event, self.kept = notify.expect, notify.advance, notify.event, notify.kept

    def stage(self, stage: Stage) -> None:
        pass


def _idle(inputs: Inputs, counts: Counts, notify: Notify) -> list[str]:
    """Warnings of entries that learned nothing."""
    found = [
        f"{named.name} has the very weights of the base: it adds nothing"
        for named, changed in zip(inputs.merged, counts.changed.tolist(), strict=True)
        if not changed
    ]
    for warning in found:
        notify.event("warning", warning)
    return found


def _entry(inputs: Inputs, step: Merge, entries: list[Source], counts: Counts, number: int) -> MergedEntry:
    named, squares = inputs.merged[number], counts.products.diagonal()
    lengths = squares.sqrt()
    cosines = [
        float(counts.products[number, other] / (lengths[number] * lengths[other]))
        if lengths[number] > 0 and lengths[other] > 0
        else None
        for other in range(len(entries))
    ]
    return MergedEntry(
        model=named.name,
        revision=named.revision,
        kind=entries[number].kind,
        weight=step.weights[number],
        changed=int(counts.changed[number]),
        trimmed=int(counts.trimmed[number]),
        conflicting=int(counts.conflicting[number]),
        used=int(counts.used[number]),
        relative_length=float(lengths[number]) / counts.base**0.5 if counts.base else None,
        cosines=cosines,
    )


def _certified(inputs: Inputs, done: Done, notify: Notify, name: Format, directory: Path) -> list[Certificate]:
    device = torch.device(inputs.device)
    return certify(
        directory,
        name,
        expected=done.measured.nll_after if done.measured else None,
        windows=done.texts.windows if done.texts else None,
        source_bytes=done.base.weight_bytes,
        dtype=compute_dtype(open_model(directory).dtype, device),
        device=device.type,
        consumers=inputs.consumers,
        texts=tokenized(done.texts.tokenizer) if done.texts else (),
        notify=notify,
    )


def _report(
    inputs: Inputs, done: Done, places: dict[Format, Path], certificates: list[Certificate], clock: Clock
) -> Report:
    spec, device = inputs.spec, torch.device(inputs.device)
    return Report(
        job=inputs.job_id,
        squeeze=__version__,
        libraries=libraries(),
        device=device_name(device),
        source=source_part(inputs, done.base),
        recipe=_recipe(spec),
        seed=spec.seed,
        calibration=None,
        quality=done.measured.quality if done.measured else None,
        merging=done.merging,
        bits_per_weight=None,
        sizes=[size_part(name, directory, done.base.weight_bytes) for name, directory in places.items()],
        blocks=[],
        damping_escalations=0,
        certificates=certificates,
        warnings=done.warnings,
        spent=spent(
            clock,
            done.work,
            certificates,
            gpu_seconds=clock.seconds.get("evaluating", 0.0) if device.type == "cuda" else 0.0,
        ),
    )


def _recipe(spec: JobSpec) -> list[dict[str, Any]]:
    """The steps, in which a directory of this machine is told by its last part alone."""
    steps = [step.model_dump(mode="json") for step in spec.steps]
    for entry in steps[0]["models"]:
        entry["model"] = PurePosixPath(entry["model"]).name if entry["model"].startswith("/") else entry["model"]
    return steps


def _trains(spec: JobSpec) -> bool:
    return any(isinstance(step, Train) for step in spec.steps)
