"""The step of a job that makes a smaller model of the same family: what matters least is found, left out, and measured.

loading -> calibrating -> compressing -> evaluating, and where no step follows exporting -> certifying
"""

from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from models.certifying.certify import certify
from models.certifying.running import tokenized
from models.closing import certified, closed, linked_out, spent, with_before
from models.files.checkpoint import SourceModel, open_model, open_or_convert
from models.fingerprint import fingerprint
from models.formats.directory import refuse_broken_companions, without_private, write_json
from models.job import Inputs, Outcome, libraries, params_named, size_part, slimming_step, source_part
from models.measuring.evaluation import Measured, measure
from models.measuring.speed import speeds
from models.progress import Notify
from models.prune.slimming import pacing
from models.prune.slimming.looking import WINDOWS, Looked, Looking
from models.resources import Clock, device_name, return_free_memory
from models.streaming.frame import Frame
from models.streaming.streams import Stream
from models.streaming.teamwork import compute_dtype
from models.streaming.walk import walk
from models.texts.material import Material
from models.work import with_what_follows
from squeeze import __version__
from squeeze.costs.slimming_work import counted_slimming
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Certificate, Report, Slimming
from squeeze.shapes.slimmed import Sides, carried, narrowed
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill
from squeeze.steps.slimming import Experts, Slim, Width
from squeeze.steps.training import Train


@dataclass(frozen=True)
class Done:
    """base: the job's own model. whole: the smaller one's directory. slimming: its part of the report. measured:
    against the base, where that was wanted. work: operations by stage. mark: of all that decides the smaller model.
    """

    base: SourceModel
    whole: Path
    slimming: Slimming
    texts: Material
    measured: Measured | None
    warnings: list[str]
    work: dict[str, float]
    mark: str


def slimmed(inputs: Inputs, step: Slim, clock: Clock, notify: Notify) -> Done:
    """Makes the smaller model, resuming where an earlier attempt stopped, and measures it."""
    method = import_module(f"models.{step.kind}.{step.method}")
    if not step.judges:
        made: Done = method.slimmed(inputs, step, clock, notify)
        return made
    device = torch.device(inputs.device)
    with clock.stage("loading"), params_named(inputs.spec, step):
        notify.stage(Stage.loading)
        base = open_or_convert(inputs.model, inputs.work / "source")
        refuse_broken_companions(base)
        frame = Frame(base, compute_dtype(base.dtype, device), device)
        frame.refuse_misfits()
        sides = sides_of(base)
        method.planned(step, frame, sides)
        work = {name: count.whole for name, count in counted_slimming(base.shape(), inputs.spec, step).items()}
        notify.expect(with_what_follows(work, base, inputs.spec, step, inputs.calibration_text))
        texts = material_of(inputs, step, frame, notify)
        mark = fingerprint(inputs.spec, inputs.identity, inputs.device, base, texts)
        warnings = texts.warnings()
        for warning in warnings:
            notify.event("warning", warning)
    with clock.stage("compressing"), params_named(inputs.spec, step):
        notify.stage(Stage.calibrating)
        looked = _looked(inputs, step, method, frame, texts, mark, notify)
        reference = frame
        if inputs.teacher is not None:
            teacher = open_or_convert(inputs.teacher, inputs.work / "teacher")
            reference = Frame(teacher, compute_dtype(teacher.dtype, device), device)
        notify.stage(Stage.compressing)
        result, found = method.smaller(step, base, sides, looked.sums, inputs.work / "smaller", notify)
        return_free_memory()
    with clock.stage("evaluating"):
        notify.stage(Stage.evaluating)
        other = Frame(result, compute_dtype(result.dtype, device), device)
        measured = _measured(inputs, reference, other, texts, looked.original, mark, notify)
        assert texts.calibration is not None, "it was looked at"
        before, after = speeds((frame, other), texts.calibration.ids[0])
    if (target := found.pop("speed_target", None)) is not None:
        found["speed_target"], missed = pacing.measured(target, before, after)
        for warning in missed:
            warnings.append(warning)
            notify.event("warning", warning)
    slimming = Slimming(
        method=step.method,
        calibration=texts.calibration.text,
        parameters_before=base.parameters,
        parameters_after=result.parameters,
        bytes_before=base.weight_bytes,
        bytes_after=result.weight_bytes,
        speed_before=before,
        speed_after=after,
        quality=measured.quality if measured is not None and len(inputs.spec.steps) > 1 else None,
        **found,
    )
    return Done(base, result.path, slimming, texts, measured, warnings, work, mark)


def refuse(step: Slim, frame: Frame) -> None:
    """Raises where a model can't be made as small, or of that family not at all; needs its config alone."""
    import_module(f"models.{step.kind}.{step.method}").planned(step, frame, frame.sides())


def judged(step: Slim, frame: Frame) -> Frame:
    """The smaller model as the next step will find it, from configs alone: as wide as it will be, with as many experts;
    of blocks that are left out it still has some.
    """
    if not isinstance(step, Width | Experts):
        return frame
    source = frame.source
    settings, _ = narrowed(step, source.config, frame.sides())
    with TemporaryDirectory() as name:
        write_json(Path(name) / "config.json", without_private(settings))
        smaller = SourceModel(Path(name), settings, {}, source.row)
        return Frame(smaller, frame.dtype, frame.device)


def sides_of(source: SourceModel) -> Sides:
    """Of the tensors that a smaller model is made of, by their names in the files."""
    return carried(source.config, {name: entry.shape for name, entry in source.entries.items()})


def run_slimming(inputs: Inputs, step: Slim, notify: Notify) -> Outcome:
    """A job of this step alone."""
    clock = Clock()
    done = slimmed(inputs, step, clock, notify)
    places = linked_out(inputs, done.whole, clock, notify)
    certificates = certified(inputs, places, partial(_certified, inputs, done, notify), clock, notify)
    return closed(inputs, places, _report(inputs, done, places, certificates, clock))


def for_what_follows(inputs: Inputs, done: Done) -> Inputs:
    """What the next step is given: the smaller model. In a distillation it learns from the original; or it teaches,
    where that names another student.
    """
    if any(isinstance(step, Distill) and not step.student.named for step in inputs.spec.steps):
        name = f"the original, made smaller by {done.slimming.method}"
        digest = done.mark if inputs.identity is not None else None
        taught = replace(inputs, student=done.whole, student_name=name, student_digest=digest)
        return taught if inputs.teacher is None else replace(taught, model=inputs.teacher)
    step = slimming_step(inputs.spec)
    taken = inputs.teacher is None and step is not None and not step.equivalent
    return replace(inputs, model=done.whole, teacher=inputs.model if taken else inputs.teacher)


def added(report: Report, inputs: Inputs, done: Done) -> Report:
    """The report of what came after, with how the model was made smaller, and the one that the job began with."""
    parts = {"slimming": done.slimming, "recipe": _recipe(inputs.spec)}
    return with_before(report, inputs, done.base, done.work, done.warnings, **parts)


def material_of(inputs: Inputs, step: Slim, frame: Frame, notify: Notify) -> Material:
    """What is looked at and measured on; nothing to measure where a training follows, which does on its own text."""
    spec = inputs.spec
    if any(isinstance(one, Train) for one in spec.steps):
        off = {"perplexity": False, "divergence": False}
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update=off)})
    return Material.of(inputs, spec, step, frame, notify)


def _looked(
    inputs: Inputs, step: Slim, method: Any, frame: Frame, texts: Material, mark: str, notify: Notify
) -> Looked:
    """What the calibration text showed, and the last hidden states of the evaluation windows; not these where the
    result is compared with another model.
    """
    assert texts.calibration is not None, "importance is told from text"
    windows = None if texts.windows is None or inputs.teacher is not None else texts.windows.ids
    found: Looked = method.look(
        step,
        Looking(
            frame,
            texts.calibration.ids,
            windows,
            inputs.work / "looked",
            mark,
            notify,
            inputs.snapshot_seconds,
            inputs.activation_bytes,
        ),
    )
    return found


def _measured(
    inputs: Inputs,
    reference: Frame,
    other: Frame,
    texts: Material,
    original: Stream | None,
    mark: str,
    notify: Notify,
) -> Measured | None:
    """The smaller model, `other`, against the reference. original: the last hidden states of this, where known."""
    if texts.windows is None:
        return None

    def last_of(frame: Frame, name: str) -> Stream:
        ids, seconds = {WINDOWS: windows.ids}, inputs.snapshot_seconds
        limit = inputs.activation_bytes
        return walk(frame, ids, inputs.work / name, mark, notify, seconds, watchers={}, memory_bytes=limit)[WINDOWS]

    windows = texts.windows
    if original is None:
        original = last_of(reference, "measured-before")
    streams = original, last_of(other, "measured")
    found = measure(other, windows, *streams, notify, reference=reference)
    for stream in streams:
        stream.clear()
    return found


def _certified(inputs: Inputs, done: Done, notify: Notify, name: Format, directory: Path) -> list[Certificate]:
    device = torch.device(inputs.device)
    return certify(
        directory,
        name,
        expected=done.measured.nll_after if done.measured else None,
        windows=done.texts.windows,
        source_bytes=done.base.weight_bytes,
        dtype=compute_dtype(open_model(directory).dtype, device),
        device=device.type,
        consumers=inputs.consumers,
        texts=tokenized(done.texts.tokenizer),
        notify=notify,
    )


def _report(
    inputs: Inputs, done: Done, places: dict[Format, Path], certificates: list[Certificate], clock: Clock
) -> Report:
    spec, device = inputs.spec, torch.device(inputs.device)
    seconds = sum(clock.seconds.get(stage, 0.0) for stage in ("compressing", "evaluating"))
    return Report(
        job=inputs.job_id,
        squeeze=__version__,
        libraries=libraries(),
        device=device_name(device),
        source=source_part(inputs, done.base),
        recipe=_recipe(spec),
        seed=spec.seed,
        calibration=done.slimming.calibration,
        quality=done.measured.quality if done.measured else None,
        slimming=done.slimming,
        bits_per_weight=None,
        sizes=[size_part(name, directory, done.base.weight_bytes) for name, directory in places.items()],
        blocks=[],
        damping_escalations=0,
        certificates=certificates,
        warnings=done.warnings,
        spent=spent(clock, done.work, certificates, gpu_seconds=seconds if device.type == "cuda" else 0.0),
    )


def _recipe(spec: JobSpec) -> list[dict[str, Any]]:
    return [step.model_dump(mode="json") for step in spec.steps]
