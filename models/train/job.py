"""The step of a job that trains: from a model's directory and examples to an adapter, a merged model, their story."""

import gc
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from models.certifying.certify import certify, loss_in_transformers
from models.certifying.running import Sample
from models.closing import certified, closed, spent, with_before
from models.distill.lesson import Lesson
from models.files.checkpoint import SourceModel, open_model
from models.files.disk import write_whole
from models.formats import layout
from models.formats.safetensors_zst import write_packed
from models.job import Inputs, Outcome, libraries, size_part, source_part
from models.progress import Notify, Silent
from models.prune.factors.factoring import multiplied_out, saved_by_factors
from models.prune.factors.handed import HandedFactors
from models.prune.zeroing.counting import left_in, saved_by_zeros, share_kept
from models.resources import (
    Clock,
    device_name,
    map_large_memory,
    return_free_memory,
)
from models.streaming.team import SOLO, Team
from models.texts.material import read_tokenizer
from models.train.accuracy import accuracies
from models.train.bases import Base, rounded_base
from models.train.checkpoints import Checkpoints
from models.train.choices import try_micro_batch
from models.train.counting import work_of
from models.train.leading import lead, told
from models.train.loop import train
from models.train.merging import stored_dtype
from models.train.prepare import TRAINING, Prepared, begun, prepare
from models.train.reading_back import ReadBack, read_back
from models.train.reference import reference_losses, weighed
from models.train.task import accelerator_of
from models.train.telling import doubts_of, sample_of, training_part
from models.train.writing import gather, write
from models.work import ahead
from squeeze import __version__
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Certificate, Report, Sparsity
from squeeze.reports.training import Training
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill, Sequence
from squeeze.steps.finetuning import Head, QLoRA
from squeeze.steps.movement import Movement
from squeeze.steps.sharding import ZERO_STAGES
from squeeze.steps.training import Train

LIBRARIES = ("peft", "accelerate")


@dataclass(frozen=True)
class Trained:
    """whole: the directory of the whole model, where one is made. samples: of each directory, held-out examples with
    the losses that it was seen to have. work: operations by stage, where they are counted. base: that adapters stand
    beside, where it was rounded for them. found: of what was written, where a whole model was.
    """

    prepared: Prepared
    whole: Path | None
    training: Training
    warnings: list[str]
    samples: dict[Path, Sample]
    work: dict[str, float]
    base: Base | None
    found: ReadBack | None

    @property
    def source(self) -> SourceModel:
        """The job's own model: what learned, or its teacher."""
        return self.prepared.teacher or self.prepared.source

    def sample(self, directory: Path) -> Sample:
        """Of a directory that was written; of one that holds the whole model in another way, of this."""
        found = self.samples.get(directory)
        if found is None:
            assert self.whole is not None, "an adapter has a sample of its own"
            found = self.samples[self.whole]
        return found

    @property
    def zeros(self) -> Sparsity | None:
        """That it made."""
        return None if self.found is None else self.found.zeros

    @property
    def factors(self) -> HandedFactors | None:
        """That learned in the place of linears."""
        return None if self.found is None else self.found.factors

    def first(self, formats: Collection[Format]) -> list[str]:
        """What the user should know before anything else, where a job ends with this."""
        if self.zeros is not None:
            fewer = stored_dtype(self.source).itemsize < self.source.dtype.itemsize
            return [saved_by_zeros(self.zeros, in_fewer_bits=fewer)]
        return [] if self.factors is None else [saved_by_factors(self.factors.told, formats)]


def trained(
    inputs: Inputs, step: Train, adapter: Path, whole: Path | None, clock: Clock, notify: Notify, team: Team = SOLO
) -> Trained:
    """Trains, resuming where an earlier attempt stopped, writes what was learned, and measures what was written.

    adapter: the directory to write what adapters learned to. whole: that of the whole model, left as it is where this
    training wrote it before. team: the leader's; the others are in `follow`.
    """
    with clock.stage("loading"):
        notify.stage(Stage.loading)
        prepared = prepare(inputs, step, notify, clock=clock)
    with team.together():
        processes = lead(team, prepared, inputs, [adapter, whole], notify)
        return _trained(replace(prepared, processes=processes), inputs, step, adapter, whole, clock, notify)


def follow(team: Team, spec: JobSpec, step: Train) -> None:
    """Waits for the leader, and has a part in the training. The result is the leader's."""
    with team.together():
        heard = told(team, spec)
        adapter, whole = heard.places
        assert adapter is not None, "the leader says where adapters go"
        prepared = replace(
            prepare(heard.inputs, step, chosen=heard.choices), processes=heard.processes, mark=heard.mark
        )
        _trained(prepared, heard.inputs, step, adapter, whole, Clock(), Silent())


def _trained(
    prepared: Prepared,
    inputs: Inputs,
    asked: Train,
    adapter: Path,
    whole: Path | None,
    clock: Clock,
    notify: Notify,
) -> Trained:
    """As `trained`, of each process that shares it. asked: the step as it came."""
    step, processes = prepared.step, prepared.processes
    if step.activation_checkpointing:
        map_large_memory()  # memory would otherwise hardly be less
    with clock.stage("loading"):
        accelerator = accelerator_of(prepared.precision, prepared.device)
    lesson, before = None, None
    if isinstance(step, Distill):
        behind = ("loading", "teaching") if isinstance(step, Sequence) else ("loading",)  # it has written by now
        expected = prepared.task(None, packed=step.packing)
        notify.expect(ahead(work_of(prepared, expected.plan, prepared.spec), prepared.source, prepared.spec, behind))
        with clock.stage("teaching"), processes.leader_first():
            lesson = Lesson(prepared, inputs, notify)
        notify.stage(Stage.loading)
    reference = None
    if step.domain_column is not None:
        with clock.stage("training"), processes.leader_first():
            reference = reference_losses(prepared, inputs, lesson, notify)
        notify.stage(Stage.loading)
    base = rounded_base(prepared, inputs, clock, notify)
    with clock.stage("loading"):
        task, initial, warnings = begun(prepared, None if base is None else base.codes)
        choices, notes = prepared.choices, None
        if choices is not None:
            if try_micro_batch(choices, task, accelerator, prepared.source, notify) is not None:
                prepared = prepared.rechosen(inputs.spec, asked)
                task = replace(task, step=prepared.step)
            notes = choices.notes
        work = work_of(prepared, task.plan, prepared.spec)
        notify.expect(ahead(work, prepared.source, prepared.spec))
        if lesson is not None:
            task, before = lesson.given(task), lesson.apart(task, accelerator)
        if reference is not None:
            task = weighed(prepared, task, reference)
    with clock.stage("training"):
        notify.stage(Stage.training)
        accuracy = task.held_out_accuracy(accelerator) if isinstance(step, Head) else None
        checkpoints = Checkpoints(inputs.work / TRAINING, prepared.mark, processes.team, notes)
        story = train(task, accelerator, checkpoints, notify, inputs.snapshot_seconds)
        losses = task.held_out_losses(accelerator)
        samples = {adapter: sample_of(task.held_out, losses)}
        if base is not None:
            with task.model.disable_adapter():
                base = base.with_sample(sample_of(task.held_out, task.held_out_losses(accelerator)))
        right = None if accuracy is None else (accuracy, task.held_out_accuracy(accelerator))
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        training = training_part(prepared, task, story, losses)
        if right is not None:
            training = training.model_copy(update=accuracies(right, task.held_out))
        if lesson is not None:
            taught = lesson.told(before, lesson.apart(task, accelerator))
            training = training.model_copy(update={"distillation": taught})
        del lesson
        packed, zeros = task.packed, bool(task.zeros)
        gather(prepared, task.model)
        if processes.team.leads:
            write(prepared, task.model, initial, inputs, adapter, whole, notify)
        processes.team.meet("what was written")
        del task, initial
        _give_back()
        found = None
        if whole is not None:
            last = asked is inputs.spec.steps[-1]
            found = read_back(prepared, inputs, whole, accelerator, packed=packed, kept_zeros=zeros, last=last)
            samples |= found.samples
            training = training.model_copy(update={"loss_written": found.loss, "zeros_kept": found.zeros_kept})
            _give_back()
    warnings += [*(base.warnings if base is not None else ()), *doubts_of(training, zeroed=isinstance(step, Movement))]
    for warning in warnings:
        notify.event("warning", warning)
    return Trained(prepared, whole, training, warnings, samples, work, base, found)


def run_training(
    inputs: Inputs,
    step: Train,
    clock: Clock,
    notify: Notify,
    team: Team = SOLO,
    completed: Callable[[Report], Report] = lambda report: report,
) -> Outcome:
    """A job that ends with training. completed: adds to the report what came before."""
    formats = inputs.spec.formats
    places: dict[Format, Path] = {name: inputs.out / name for name in formats}
    adapter, whole = places.get("peft", inputs.work / "adapter"), places.get("safetensors")
    if whole is None and ("safetensors-zst" in places or "onnx" in places):
        whole = inputs.work / "whole"  # whose other weights go with the factors
    done = trained(inputs, step, adapter, whole, clock, notify, team)
    if done.base is not None and "gptq" in places:
        with clock.stage("exporting"):
            layout("gptq").write(done.source, done.base.codes, places["gptq"], notify)
    if done.whole is not None and "safetensors-zst" in places:
        with clock.stage("exporting"):
            write_packed(done.whole, places["safetensors-zst"])
    if done.factors is not None and "onnx" in places and whole is not None:
        with clock.stage("exporting"):
            plain = open_model(whole)
            layout("onnx").write(plain, done.factors.of(plain), places["onnx"], notify)
    certificates = certified(inputs, places, partial(_certified, inputs, done, notify), clock, notify)
    return closed(inputs, places, completed(_report(inputs, done, places, certificates, clock)))


def _certified(inputs: Inputs, done: Trained, notify: Notify, name: Format, directory: Path) -> list[Certificate]:
    step, dtype = done.prepared.step, str(done.prepared.dtype).removeprefix("torch.")
    base = inputs.model if done.base is None else inputs.out / "gptq"
    return certify(
        directory,
        name,
        sample=done.sample(directory) if done.base is None or name != "gptq" else done.base.sample,
        base=base if name == "peft" else None,
        base_settings=step.base_settings(dtype) if isinstance(step, QLoRA) else None,
        source_bytes=done.source.weight_bytes,
        dtype=done.prepared.dtype,
        device=done.prepared.device.type,
        consumers=inputs.consumers,
        notify=notify,
    )


def _give_back() -> None:
    gc.collect()
    return_free_memory()


def _report(
    inputs: Inputs, done: Trained, places: dict[Format, Path], certificates: list[Certificate], clock: Clock
) -> Report:
    spec, device, base = inputs.spec, done.prepared.device, done.base
    blocks = [] if base is None else base.blocks
    on_gpu = (clock.seconds.get("compressing", 0.0) + clock.seconds["training"]) * done.training.processes
    return Report(
        job=inputs.job_id,
        squeeze=__version__,
        libraries=libraries(*LIBRARIES, *(("deepspeed",) if done.training.sharding in ZERO_STAGES else ())),
        device=device_name(device, done.training.processes),
        source=source_part(inputs, done.source),
        recipe=[step.model_dump(mode="json") for step in spec.steps],
        seed=spec.seed,
        calibration=None if base is None else base.calibration,
        quality=None if base is None else base.quality,
        training=done.training,
        sparsity=done.zeros,
        bits_per_weight=None if base is None else base.codes.bits_per_weight,
        sizes=[size_part(name, directory, done.source.weight_bytes) for name, directory in places.items()],
        blocks=blocks,
        damping_escalations=sum(layer.damping_escalations for block in blocks for layer in block.layers),
        certificates=certificates,
        warnings=[*([] if inputs.goes_on else done.first(spec.formats)), *done.warnings],
        factoring=None if done.factors is None else done.factors.told,
        spent=spent(
            clock,
            done.work,
            certificates,
            gpu_seconds=on_gpu if device.type == "cuda" else 0.0,
            earlier_bytes=max((block.peak_host_bytes for block in blocks), default=0),
        ),
    )


def for_what_follows(inputs: Inputs, done: Trained) -> Inputs:
    """What the next step is given: the merged model, and both sides of the split as the model reads them, so that what
    was held out from training is held out from calibration too.
    """
    assert done.whole is not None, "a step that goes on needs a whole model"
    tokenizer, split = read_tokenizer(done.prepared.source.path), done.prepared.split
    files = {}
    for name, side, column in (
        ("learned", split.train, inputs.spec.data.column),
        ("held-out", split.held_out, inputs.spec.evaluation.column),
    ):
        files[name] = inputs.work / f"{name}.jsonl"
        texts = (tokenizer.decode(side.one(number)[0]) for number in range(len(side)))
        write_whole(files[name], "".join(json.dumps({column or "text": text}) + "\n" for text in texts))
    return replace(
        inputs,
        spec=done.prepared.spec,
        model=done.whole,
        calibration_text=files["learned"],
        evaluation_text=files["held-out"],
        calibration_origin=split.data.origin,
        evaluation_origin=split.data.held_out_origin,
    )


def added(report: Report, inputs: Inputs, done: Trained) -> Report:
    """The report of what came after the training, with the training and the model that it began with; what it wrote is
    measured on the same held-out examples.
    """
    device, losses = done.prepared.device.type, {}
    everything = sample_of(done.prepared.held_out)
    for size in report.sizes:
        name = cast(Format, size.format)
        losses[name] = loss_in_transformers(inputs.out / name, name, everything, done.prepared.dtype, device)
    known = {name: loss for name, loss in losses.items() if loss is not None}
    sparsity, told = report.sparsity, done.warnings
    if sparsity is None and done.zeros is not None:
        sites = done.prepared.sites
        kept = share_kept(report, {site.name: site.rows * site.columns * done.zeros.reached for site in sites})
        sparsity, told = done.zeros.model_copy(update={"zeros_kept": kept}), [left_in(done.zeros, kept), *told]
    factors = None if done.factors is None else done.factors.told
    if factors is not None:
        told = [multiplied_out(factors), *told]
    return with_before(
        report,
        inputs,
        done.source,
        done.work,
        told,
        factoring=factors or report.factoring,
        training=done.training.model_copy(update={"loss_quantized": known}),
        sparsity=sparsity,
        libraries=report.libraries | libraries(*LIBRARIES),
    )
