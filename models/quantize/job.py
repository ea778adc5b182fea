"""A step of a job that compresses: from a model's directory and texts to directories that load, and their story.

loading -> calibrating -> compressing (evaluating in the same pass) -> evaluating -> exporting -> certifying
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from models.bits.allocation import allot, allots
from models.certifying.certify import certify
from models.certifying.running import tokenized
from models.closing import certified, closed, spent
from models.files.checkpoint import SourceModel, open_model, open_or_convert
from models.fingerprint import fingerprint
from models.formats import layout
from models.formats.directory import refuse_broken_companions
from models.formats.gguf import refuse_source
from models.formats.safetensors_zst import restored
from models.job import (
    Inputs,
    Outcome,
    compress_step,
    libraries,
    params_named,
    size_part,
    source_part,
)
from models.measuring.evaluation import Measured, measure
from models.progress import Notify
from models.prune.factors import factoring
from models.prune.zeroing.counting import counted_codes, counted_zeros, saved_by_zeros
from models.prune.zeroing.outliers import spread
from models.quantize.rotation import told
from models.resources import Clock, device_name
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.team import Team
from models.streaming.teamwork import Frames, frames_of, lead
from models.texts.material import Material
from models.train import rounded
from models.weights import casts
from models.weights.quantized import QuantizedModel
from models.work import work_of
from squeeze import __version__
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Allocation, Block, Certificate, Factoring, Report, Sparsity
from squeeze.reports.training import Tuning
from squeeze.reports.zeros import BlockZeros
from squeeze.steps.compressing import Compress
from squeeze.steps.factoring import SVD
from squeeze.steps.quantization import QAT, Grouped, Quantize
from squeeze.steps.schemes import Scheme
from squeeze.steps.sparsifying import Sparsify, Uneven


def run_compression(
    inputs: Inputs,
    clock: Clock,
    notify: Notify,
    team: Team,
    completed: Callable[[Report], Report] = lambda report: report,
) -> Outcome:
    """A job's last step, or its only one. completed: adds to the report what came before."""
    written = compressed(inputs, clock, notify, team)
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        directories = written.export(notify)
        zeros = written.zeros(next(iter(directories.values())))
    for warning in written.first(zeros):
        notify.event("warning", warning)
    certificates = certified(inputs, directories, partial(written.certify, notify), clock, notify)
    return closed(inputs, directories, completed(written.report(directories, certificates, clock, zeros)))


def compressed(inputs: Inputs, clock: Clock, notify: Notify, team: Team) -> "Compressed":
    """Compresses by the job's last step, and measures the result; nothing is written yet but what the next attempt
    resumes from.
    """
    step = compress_step(inputs.spec)
    with clock.stage("loading"):
        notify.stage(Stage.loading)
        begun = _begun(inputs, step, notify)
    codes = _codes(inputs, step, begun, clock, notify, team)
    measured: Measured | None = None
    if begun.texts.windows is not None:
        with clock.stage("evaluating"):
            notify.stage(Stage.evaluating)
            held = codes.done.activations
            streams, frames = (held.original, held.compressed), begun.frames
            measured = measure(frames.result, begun.texts.windows, *streams, notify, reference=frames.reference)
    codes.done.activations.release()
    factors: Factoring | None = None
    if codes.ranked is not None and isinstance(step, SVD) and begun.texts.calibration is not None:
        with clock.stage("evaluating"):
            factors = factoring.told(step, codes.ranked, begun.frames.result, codes.done, begun.texts.calibration.ids)
    return Compressed(inputs, team, begun, codes, measured, factors)


@dataclass(frozen=True)
class _Begun:
    """What is there before the first block. work: counted, by stage. losses: of a cast to 16 bits."""

    source: SourceModel
    frames: Frames
    texts: Material
    work: dict[str, float]
    losses: dict[str, casts.Loss] | None
    warnings: list[str]


@dataclass(frozen=True)
class _Codes:
    """What the last block left. allocation: of bits `auto`. tuning: where the rounded model then learned. uneven: where
    each block has its own share of zeros. ranked: of a step that factors.
    """

    done: engine.Quantization
    blocks: list[Block]
    allocation: Allocation | None
    tuning: Tuning | None
    uneven: list[BlockZeros] | None
    ranked: factoring.Ranked | None = None

    @property
    def model(self) -> QuantizedModel:
        return self.done.model


def _begun(inputs: Inputs, step: Compress, notify: Notify) -> _Begun:
    spec = inputs.spec
    source = open_or_convert(inputs.model, inputs.work / "source")
    refuse_broken_companions(source)
    work = work_of(source, spec, step)
    notify.expect(work)
    if "gguf" in spec.formats:
        refuse_source(source)
    device = torch.device(inputs.device)
    frames = frames_of(source, step, device, None if inputs.original is None else open_model(inputs.original))
    if isinstance(step, QAT):
        rounded.refuse_too_large_to_train(spec, step, frames.result, device)
    losses = None if frames.target is None else casts.losses(source, frames.target)
    texts = Material.of(inputs, spec, step, frames.reference, notify)
    warnings = [*engine.idle_patterns(step, frames.reference), *texts.warnings()]
    if frames.target is not None and losses is not None:
        warnings += casts.told(losses, frames.target)
    for warning in warnings:
        notify.event("warning", warning)
    return _Begun(source, frames, texts, work, losses, warnings)


def _codes(inputs: Inputs, step: Compress, begun: _Begun, clock: Clock, notify: Notify, team: Team) -> _Codes:
    frames, texts, schemes, allocation, ranked = begun.frames, begun.texts, None, None, None
    if isinstance(step, Grouped) and allots(step):
        with clock.stage("allotting"):
            schemes, allocation = _allot(inputs, frames.result, step, texts, notify)
    uneven: list[BlockZeros] | None = None
    if isinstance(step, Uneven) and step.distribution == "owl":
        with clock.stage("allotting"):
            schemes, uneven = _spread(inputs, frames.result, step, texts, notify)
    if isinstance(step, SVD):
        with clock.stage("allotting"):
            ranked = _rank(inputs, frames.result, step, texts, notify)
            schemes = ranked.schemes
    mark = fingerprint(inputs.spec, inputs.identity, inputs.device, begun.source, texts, schemes)
    with clock.stage("compressing"):
        done = lead(
            team,
            frames,
            step.begun if isinstance(step, QAT) else step,
            texts.calibration.ids if texts.calibration and step.reads_inputs else None,
            texts.windows,
            inputs.work / step.kind,
            mark,
            notify,
            snapshot_seconds=inputs.snapshot_seconds,
            memory_bytes=inputs.activation_bytes,
            schemes=schemes,
            method=ranked,
        )
    tuning: Tuning | None = None
    if isinstance(step, QAT):
        done, tuning = _learned(inputs, step, frames, texts, schemes, done, mark, clock, notify)
    blocks = done.blocks if begun.losses is None else casts.noted(done.blocks, begun.losses, begun.source)
    return _Codes(done, blocks, allocation, tuning, uneven, ranked)


def _allot(
    inputs: Inputs, frame: Frame, step: Grouped, texts: Material, notify: Notify
) -> tuple[dict[str, Scheme], Allocation]:
    assert texts.calibration is not None, "bits `auto` needs text"
    spec, source, directory = inputs.spec, frame.source, inputs.work / "sensitivity"
    mark = fingerprint(spec, inputs.identity, inputs.device, source, texts)
    with params_named(spec):
        ids = texts.calibration.ids
        return allot(frame, step, spec.formats, ids, directory, mark, notify, inputs.activation_bytes)


def _spread(
    inputs: Inputs, frame: Frame, step: Uneven, texts: Material, notify: Notify
) -> tuple[dict[str, Scheme], list[BlockZeros]]:
    assert texts.calibration is not None, "outliers are told from text"
    mark = fingerprint(inputs.spec, inputs.identity, inputs.device, frame.source, texts)
    return spread(
        frame,
        step,
        engine.schemes_of(frame, step),
        texts.calibration.ids,
        inputs.work / "outliers",
        mark,
        notify,
        inputs.snapshot_seconds,
        inputs.activation_bytes,
    )


def _rank(inputs: Inputs, frame: Frame, step: SVD, texts: Material, notify: Notify) -> factoring.Ranked:
    assert texts.calibration is not None, "a decomposition is weighed by text"
    mark = fingerprint(inputs.spec, inputs.identity, inputs.device, frame.source, texts)
    with params_named(inputs.spec, step):
        ids, directory = texts.calibration.ids, inputs.work / "spectra"
        return factoring.ranked(frame, step, ids, directory, mark, notify, inputs.activation_bytes)


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
class Compressed:
    """Everything that the end of a job needs: writes the directories, has them certified, tells the story.

    measured: against the original, where that was wanted. factors: of a step that factors.
    """

    inputs: Inputs
    team: Team
    begun: _Begun
    codes: _Codes
    measured: Measured | None
    factors: Factoring | None = None

    def export(self, notify: Notify) -> dict[Format, Path]:
        stored = self.begun.frames.turned or self.begun.source  # that which is not quantized is taken from
        directories: dict[Format, Path] = {}
        for name in self.inputs.spec.formats:
            directories[name] = self.inputs.out / name
            layout(name).write(stored, self.codes.model, directories[name], notify)
        return directories

    def zeros(self, directory: Path) -> Sparsity | None:
        """Of a directory that was written, where the step zeroes weights."""
        step = self.codes.model.step
        if not isinstance(step, Sparsify):
            return counted_codes(self.begun.source, directory, self.codes.model) if step.zeroed else None
        counted = self._counted(directory, step)
        return counted.model_copy(update={"distribution": self.codes.uneven})

    def _counted(self, directory: Path, step: Sparsify) -> Sparsity:
        sites = self.codes.model.sites.values()
        if directory.name == "safetensors-zst":
            with restored(directory) as plain:
                return counted_zeros(self.begun.source, plain, sites, step)
        return counted_zeros(self.begun.source, directory, sites, step)

    def first(self, zeros: Sparsity | None) -> list[str]:
        """What the user should know before anything else, of a step that prunes."""
        if self.factors is not None:  # what comes of them, the round says that ends the job
            return [] if self.inputs.goes_on else [factoring.saved_by_factors(self.factors, self.inputs.spec.formats)]
        return [] if zeros is None else [saved_by_zeros(zeros)]

    def certify(self, notify: Notify, name: Format, directory: Path) -> list[Certificate]:
        frame = self.begun.frames.result
        return certify(
            directory,
            name,
            expected=self.measured.nll_after if self.measured else None,
            windows=self.begun.texts.windows,
            source_bytes=self.begun.source.weight_bytes,
            dtype=frame.dtype,
            device=frame.device.type,
            consumers=self.inputs.consumers,
            texts=tokenized(self.begun.texts.tokenizer),
            notify=notify,
        )

    def report(
        self,
        directories: dict[Format, Path],
        certificates: list[Certificate],
        clock: Clock,
        zeros: Sparsity | None = None,
    ) -> Report:
        inputs, spec, begun, blocks = self.inputs, self.inputs.spec, self.begun, self.codes.blocks
        frames, calibration = begun.frames, begun.texts.calibration
        quality = self.measured.quality if self.measured else None
        on_gpu = frames.reference.device.type == "cuda"
        return Report(
            job=inputs.job_id,
            squeeze=__version__,
            libraries=libraries(),
            device=device_name(frames.reference.device, self.team.size),
            source=source_part(inputs, begun.source),
            recipe=[step.model_dump(mode="json") for step in spec.steps],
            seed=spec.seed,
            calibration=calibration.text if calibration else None,
            quality=quality,
            tuning=self.codes.tuning,
            bits_per_weight=self.codes.model.bits_per_weight if isinstance(self.codes.model.step, Quantize) else None,
            sparsity=zeros,
            factoring=self.factors,
            rotation=None if frames.turned is None else told(frames.turned, frames.reference, frames.result),
            allocation=self.codes.allocation,
            sizes=[size_part(name, directory, begun.source.weight_bytes) for name, directory in directories.items()],
            blocks=blocks,
            damping_escalations=sum(layer.damping_escalations for block in blocks for layer in block.layers),
            certificates=certificates,
            warnings=[*self.first(zeros), *begun.warnings],
            spent=spent(
                clock,
                begun.work,
                certificates,
                gpu_seconds=clock.seconds["compressing"] * self.team.size if on_gpu else 0.0,
                earlier_bytes=max((block.peak_host_bytes for block in blocks), default=0),
            ),
        )
