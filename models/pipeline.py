"""A job's way through this room: a model directory and a spec in, model directories and a report out.

loading -> training, where a step trains; of what that made, or of the source, where a step quantizes: loading ->
calibrating -> compressing (evaluating in the same pass) -> evaluating -> exporting -> certifying
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import casts, engine
from models.allocation import allot, allots, mixed
from models.architectures import architecture_of
from models.card import write_card
from models.certify import certify
from models.certify_run import tokenized
from models.checkpoint import SourceModel, open_or_convert, read_config
from models.disk import disk_faults, write_whole
from models.evaluation import Measured, measure
from models.experts import refuse_torn
from models.fingerprint import fingerprint
from models.formats import layout
from models.formats.directory import refuse_broken_companions
from models.formats.gguf import refuse_source
from models.frame import Frame
from models.job import Inputs, Outcome, libraries, result_of, size_part, source_part
from models.kv_cache import refuse_unknown_attention
from models.material import Material, read_tokenizer, refuse_too_large_for_self
from models.progress import Notify
from models.quantized import QuantizedModel
from models.resources import Clock, cpu_seconds, device_name, peak_gpu_bytes, peak_host_bytes
from models.rotation import told
from models.team import SOLO, Team
from models.teamwork import Frames, frames_of, lead
from models.teamwork import follow as follow_quantizing
from models.train import rounded
from models.train.job import added, for_what_follows, run_training, trained
from models.train.job import follow as follow_training
from models.train.optimizers import refuse_without_gpu
from models.train.prepare import refuse_untrainable
from squeeze import __version__
from squeeze.architectures import HELD_BY, refuse_unrotatable
from squeeze.errors import FormatUnfit, ModelMalformed, SqueezeError
from squeeze.formats import candidates
from squeeze.objects import Stage
from squeeze.report import Allocation, Block, Certificate, Report, Rotation, Spent, Tuning
from squeeze.schemes import Scheme
from squeeze.specs import JobSpec
from squeeze.steps import QAT, Format, Grouped, Quantize, Step
from squeeze.training import Train
from squeeze.work import counted


@dataclass(frozen=True)
class Facts:
    """What config.json alone tells of a model: its family, the number of its blocks, the linears to compress."""

    model_type: str
    blocks: int
    linears: int


def check(spec: JobSpec, model: Path) -> Facts:
    """Refuses what can't work, from `config.json` alone, before any weight is fetched."""
    config = read_config(model)
    frame = Frame(SourceModel(model, config, {}, architecture_of(config)), torch.float32, torch.device("cpu"))
    training = training_step(spec)
    if training is not None:
        with _params_named(spec, training):
            count = refuse_untrainable(training, frame)
        if training is spec.steps[-1] or len(spec.models) > 1:  # another model goes on to the next step
            return Facts(config["model_type"], frame.count, count)
    return _check_quantizable(spec, config, frame)


def check_student(spec: JobSpec, model: Path) -> Facts:
    """As `check`, of the model that learns from the job's own and goes on to the next step."""
    config = read_config(model)
    frame = Frame(SourceModel(model, config, {}, architecture_of(config)), torch.float32, torch.device("cpu"))
    if isinstance(spec.steps[-1], Quantize):
        return _check_quantizable(spec, config, frame)
    return Facts(config["model_type"], frame.count, sum(len(frame.sites(n)) for n in range(frame.count)))


def _check_quantizable(spec: JobSpec, config: dict[str, Any], frame: Frame) -> Facts:
    step = _quantize_step(spec)
    refuse_too_large_for_self(spec, step, frame)
    if isinstance(step, QAT):
        rounded.refuse_too_large_to_train(spec, step, frame)
    if step.rotation is not None:
        refuse_unrotatable(config["model_type"], _param(spec, "rotation"))
    schemes = engine.schemes_of(frame, step)
    sites = [site for n in range(frame.count) for site in frame.sites(n) if site.name in schemes]
    if not sites:
        raise ModelMalformed("`ignore` leaves no linear layer to quantize", param=_param(spec, "ignore"))
    if isinstance(step, Grouped) and allots(step):
        schemes = mixed(schemes, candidates(step, spec.formats))
    held = HELD_BY[config["model_type"]]
    for name in spec.formats:
        if name not in held:
            raise FormatUnfit(
                f"{name} can't hold {config['model_type']} models; {', '.join(held)} can", param="formats"
            )
        with _params_named(spec):
            layout(name).refuse(sites, schemes)
            if step.kv_cache is not None:
                refuse_unknown_attention(frame)
            if name != "gguf":  # which stacks one linear of a layer's experts at a time, and says itself where it can't
                refuse_torn([linears for n in range(frame.count) for linears in frame.experts(n).values()], schemes)
    return Facts(config["model_type"], frame.count, len(sites))


def run(inputs: Inputs, notify: Notify, team: Team = SOLO) -> Outcome:
    """Runs all steps of a job. Raises a SqueezeError that says what to do; anything else is a bug.

    team: the leader's; the others are in `follow`.
    """
    with disk_faults():
        return _run(inputs, notify, team)


def follow(spec: JobSpec, team: Team) -> None:
    """What another process of the team than its leader does: its share of each step, as the leader comes to it."""
    for step in spec.steps:
        if isinstance(step, Train):
            follow_training(team, spec, step)
        elif isinstance(step, Quantize):
            follow_quantizing(team, step)


def _run(inputs: Inputs, notify: Notify, team: Team) -> Outcome:
    notify.stage(Stage.planning)
    torch.manual_seed(inputs.spec.seed)
    check(inputs.spec, inputs.model)
    if inputs.student is not None:
        check_student(inputs.spec, inputs.student)
    training, clock = training_step(inputs.spec), Clock()
    if training is None:
        return _quantized(inputs, clock, notify, team)
    with _params_named(inputs.spec, training):
        refuse_without_gpu(training, torch.device(inputs.device))
        if training is inputs.spec.steps[-1]:
            return run_training(inputs, training, notify, team)
        done = trained(inputs, training, inputs.work / "adapter", inputs.work / "whole", clock, notify, team)
    following = for_what_follows(inputs, done)
    return _quantized(following, clock, notify, team, lambda report: added(report, inputs, done))


def _quantized(
    inputs: Inputs,
    clock: Clock,
    notify: Notify,
    team: Team,
    completed: Callable[[Report], Report] = lambda report: report,
) -> Outcome:
    """The step that quantizes, which is the last. completed: adds to the report what came before."""
    spec, step = inputs.spec, _quantize_step(inputs.spec)
    with clock.stage("loading"):
        notify.stage(Stage.loading)
        source = open_or_convert(inputs.model, inputs.work / "source")
        refuse_broken_companions(source)
        work = {name: count.whole for name, count in counted(source.shape(step.ignore), spec).items()}
        notify.expect(work)
        if "gguf" in spec.formats:
            refuse_source(source)
        device = torch.device(inputs.device)
        frames = frames_of(source, step, device)
        if isinstance(step, QAT):
            rounded.refuse_too_large_to_train(spec, step, frames.result, device)
        frame, result, turned, target = frames.reference, frames.result, frames.turned, frames.target
        losses = None if target is None else casts.losses(source, target)
        tokenizer = read_tokenizer(inputs.model)
        texts = Material(
            spec,
            step,
            tokenizer,
            frame,
            inputs.calibration_text,
            inputs.evaluation_text,
            origins=(inputs.calibration_origin, inputs.evaluation_origin),
            work=inputs.work,
            notify=notify,
        )
        warnings = [*engine.idle_patterns(step, frame), *texts.warnings()]
        if target is not None and losses is not None:
            warnings += casts.told(losses, target)
        for warning in warnings:
            notify.event("warning", warning)
    schemes, allocation = None, None
    if isinstance(step, Grouped) and allots(step):
        with clock.stage("allotting"):
            schemes, allocation = _allot(inputs, result, step, texts, notify)
    mark = fingerprint(spec, inputs.revision, inputs.device, source, texts, schemes)
    with clock.stage("compressing"):
        done = lead(
            team,
            frames,
            step,
            texts.calibration.ids if texts.calibration and step.reads_inputs else None,
            texts.windows,
            inputs.work / "quantize",
            mark,
            notify,
            snapshot_seconds=inputs.snapshot_seconds,
            memory_bytes=inputs.activation_bytes,
            schemes=schemes,
        )
    tuning: Tuning | None = None
    if isinstance(step, QAT):
        done, tuning = _learned(inputs, step, frames, texts, schemes, done, mark, clock, notify)
    blocks = done.blocks if losses is None else casts.noted(done.blocks, losses, source)
    measured: Measured | None = None
    if texts.windows is not None:
        with clock.stage("evaluating"):
            notify.stage(Stage.evaluating)
            streams = done.activations.original, done.activations.compressed
            measured = measure(result, texts.windows, *streams, notify, reference=frame)
    done.activations.release()
    rotation = None if turned is None else told(turned, frame, result)
    written = _Written(
        inputs,
        team,
        source,
        turned or source,
        tokenizer,
        done.model,
        blocks,
        texts,
        measured,
        warnings,
        rotation,
        allocation,
        tuning,
    )
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        directories = written.export(notify)
    with clock.stage("certifying"):
        notify.stage(Stage.certifying)
        certificates = written.certify(directories, result, notify)
    report = completed(written.report(directories, certificates, clock, frame, work))
    for name, directory in directories.items():
        write_card(directory, name, report)
    write_whole(inputs.out / "report.json", report.model_dump_json(indent=2) + "\n")
    return Outcome(directories, report, result_of(report, directories))


def training_step(spec: JobSpec) -> Train | None:
    return next((step for step in spec.steps if isinstance(step, Train)), None)


def _quantize_step(spec: JobSpec) -> Quantize:
    return next(step for step in spec.steps if isinstance(step, Quantize))


def _param(spec: JobSpec, name: str, step: Step | None = None) -> str:
    """A field of a step, by default of the one that quantizes, as the request names it; other fields as they are."""
    number = spec.steps.index(step or _quantize_step(spec))
    return f"steps.{number}.{name}" if name.partition(".")[0] in type(spec.steps[number]).model_fields else name


@contextmanager
def _params_named(spec: JobSpec, step: Step | None = None) -> Iterator[None]:
    """Errors that name a field of the step name it as the request does."""
    try:
        yield
    except SqueezeError as error:
        error.param = error.param and _param(spec, error.param, step)
        raise


def _allot(
    inputs: Inputs, frame: Frame, step: Grouped, texts: Material, notify: Notify
) -> tuple[dict[str, Scheme], Allocation]:
    assert texts.calibration is not None, "bits `auto` needs text"
    spec, source, directory = inputs.spec, frame.source, inputs.work / "sensitivity"
    mark = fingerprint(spec, inputs.revision, inputs.device, source, texts)
    with _params_named(spec):
        ids = texts.calibration.ids
        return allot(frame, step, spec.formats, ids, directory, mark, notify, inputs.activation_bytes)


def _learned(
    inputs: Inputs,
    step: QAT,
    frames: Frames,
    texts: Material,
    schemes: dict[str, Scheme] | None,
    done: engine.Quantization,
    mark: str,
    clock: Clock,
    notify: Notify,
) -> tuple[engine.Quantization, Tuning]:
    """What becomes of a first pass where the rounded model then learns."""
    assert texts.calibration is not None, "a step that learns looks at text"
    begun = rounded.Begun(
        step,
        frames,
        texts.calibration.ids,
        texts.windows,
        done,
        inputs.work / "rounded",
        mark,
        inputs.spec.seed,
        schemes,
        inputs.snapshot_seconds,
        inputs.activation_bytes,
    )
    with clock.stage("training"):
        model, tuning = rounded.learned_codes(begun, notify)
    with clock.stage("compressing"):
        return rounded.passed_again(begun, model, notify), tuning


@dataclass(frozen=True)
class _Written:
    """Everything that the end of a job needs: writes the directories, has them certified, tells the story.

    stored: what the tensors that are not quantized are taken from, where that is not the source itself.
    """

    inputs: Inputs
    team: Team
    source: SourceModel
    stored: SourceModel
    tokenizer: Any
    model: QuantizedModel
    blocks: list[Block]
    texts: Material
    measured: Measured | None
    warnings: list[str]
    rotation: Rotation | None
    allocation: Allocation | None
    tuning: Tuning | None

    def export(self, notify: Notify) -> dict[Format, Path]:
        directories: dict[Format, Path] = {}
        for name in self.inputs.spec.formats:
            directories[name] = self.inputs.out / name
            layout(name).write(self.stored, self.model, directories[name], notify)
        return directories

    def certify(self, directories: dict[Format, Path], frame: Frame, notify: Notify) -> list[Certificate]:
        certificates = []
        for number, (name, directory) in enumerate(directories.items()):
            certificates += certify(
                directory,
                name,
                expected=self.measured.nll_after if self.measured else None,
                windows=self.texts.windows,
                source_bytes=self.source.weight_bytes,
                dtype=frame.dtype,
                device=frame.device.type,
                consumers=self.inputs.consumers,
                texts=tokenized(self.tokenizer),
                notify=notify,
            )
            notify.advance(number + 1, len(directories), "formats")
        return certificates

    def report(
        self,
        directories: dict[Format, Path],
        certificates: list[Certificate],
        clock: Clock,
        frame: Frame,
        work: dict[str, float],
    ) -> Report:
        inputs, spec = self.inputs, self.inputs.spec
        quality = self.measured.quality if self.measured else None
        on_gpu = frame.device.type == "cuda"
        return Report(
            job=inputs.job_id,
            squeeze=__version__,
            libraries=libraries(),
            device=device_name(frame.device, self.team.size),
            source=source_part(inputs, self.source),
            recipe=[step.model_dump(mode="json") for step in spec.steps],
            seed=spec.seed,
            calibration=self.texts.calibration.text if self.texts.calibration else None,
            quality=quality,
            tuning=self.tuning,
            bits_per_weight=self.model.bits_per_weight,
            rotation=self.rotation,
            allocation=self.allocation,
            sizes=[size_part(name, directory, self.source.weight_bytes) for name, directory in directories.items()],
            blocks=self.blocks,
            damping_escalations=sum(layer.damping_escalations for block in self.blocks for layer in block.layers),
            certificates=certificates,
            warnings=self.warnings,
            spent=Spent(
                seconds=clock.seconds,
                work=work,
                cpu_seconds=round(cpu_seconds(), 3),
                gpu_seconds=round(clock.seconds["compressing"] * self.team.size, 3) if on_gpu else 0.0,
                peak_host_bytes=max([peak_host_bytes(), *(block.peak_host_bytes for block in self.blocks)]),
                peak_gpu_bytes=peak_gpu_bytes(),
                certifier_peak_host_bytes=max((one.peak_host_bytes or 0 for one in certificates), default=0) or None,
            ),
        )
