"""A job's way through this room: a model directory and a spec in, model directories and a report out.

loading -> calibrating -> compressing (evaluating in the same pass) -> evaluating -> exporting -> certifying
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from models import engine
from models.architectures import architecture_of
from models.card import write_card
from models.certify import certify
from models.checkpoint import SourceModel, convert_legacy, has_legacy_weights_only, open_model, read_config
from models.data import Calibration, Windows, calibration_batches, evaluation_windows
from models.evaluation import Measured, measure
from models.formats import layout
from models.formats.directory import weight_bytes
from models.frame import Frame
from models.progress import Notify
from models.quantized import QuantizedModel
from models.resources import cpu_seconds, peak_gpu_bytes, peak_host_bytes
from squeeze import __version__
from squeeze.architectures import HELD_BY
from squeeze.errors import CertificationFailed, FormatUnfit, ModelMalformed, SqueezeError
from squeeze.objects import Result, Stage
from squeeze.report import Block, Certificate, Report, Size, Source, Spent
from squeeze.specs import JobSpec
from squeeze.steps import Format, Quantize

LIBRARIES = ("torch", "transformers", "compressed-tensors", "gptqmodel", "safetensors", "tokenizers")
# On tiny random models at 3 bits GPTQ was worse than round-to-nearest at 3 tokens per input column, a fifth better at 16.
TOKENS_PER_INPUT = 8
GENERIC_WARNING = (
    "measured on generic text (the source of Python's standard library); figures on it say little about your own "
    "text: upload some and name it as data.source"
)


@dataclass(frozen=True)
class Inputs:
    """model: the source's directory. work: kept between attempts, so that the next one resumes. out: emptied first.

    calibration_text, evaluation_text: JSONL, plain text or parquet; None: the generic text, or a held-out part of
    calibration_text. model_name: as the user named it, without anything private.
    """

    spec: JobSpec
    model: Path
    model_name: str
    revision: str | None
    license: str | None
    calibration_text: Path | None
    evaluation_text: Path | None
    work: Path
    out: Path
    device: str
    vllm_python: Path | None
    job_id: str
    snapshot_seconds: float = engine.SNAPSHOT_SECONDS


@dataclass(frozen=True)
class Outcome:
    """directories: a model directory for each format, beside `report.json`."""

    directories: dict[Format, Path]
    report: Report
    result: Result


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
    step = _quantize_step(spec)
    sites = [site for n in range(frame.count) for site in frame.sites(n) if not engine.is_ignored(step, site.name)]
    if not sites:
        raise ModelMalformed("`ignore` leaves no linear layer to quantize", param=_param(spec, "ignore"))
    held = HELD_BY[config["model_type"]]
    for name in spec.formats:
        if name not in held:
            raise FormatUnfit(
                f"{name} can't hold {config['model_type']} models; {', '.join(held)} can", param="formats"
            )
        try:
            layout(name).refuse(sites, step)
        except SqueezeError as error:
            error.param = error.param and _param(spec, error.param)
            raise
    return Facts(config["model_type"], frame.count, len(sites))


def run(inputs: Inputs, notify: Notify) -> Outcome:
    """Runs all steps of a job. Raises a SqueezeError that says what to do; anything else is a bug."""
    clock = _Clock()
    spec, step = inputs.spec, _quantize_step(inputs.spec)
    notify.stage(Stage.planning)
    torch.manual_seed(spec.seed)
    check(spec, inputs.model)
    with clock.stage("loading"):
        notify.stage(Stage.loading)
        source = _open(inputs)
        device = torch.device(inputs.device)
        frame = Frame(source, compute_dtype(source.dtype, device), device)
        texts = _Texts(inputs, frame)
        warnings = texts.warn(notify)
    with clock.stage("compressing"):
        done = engine.quantize(
            frame,
            step,
            texts.calibration.ids if texts.calibration else None,
            texts.windows,
            inputs.work / "quantize",
            _fingerprint(inputs, source, texts),
            notify,
            inputs.snapshot_seconds,
        )
    measured: Measured | None = None
    if texts.windows is not None:
        with clock.stage("evaluating"):
            notify.stage(Stage.evaluating)
            measured = measure(frame, texts.windows, done.activations.original, done.activations.compressed, notify)
    written = _Written(inputs, source, done.model, done.blocks, texts, measured, warnings)
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        directories = written.export(notify)
    with clock.stage("certifying"):
        notify.stage(Stage.certifying)
        certificates = written.certify(directories, frame, notify)
    report = written.report(directories, certificates, clock, frame)
    for name, directory in directories.items():
        write_card(directory, name, report)
    (inputs.out / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    return Outcome(directories, report, _result(report, directories))


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that activations are computed in: as stored, but CPUs have no fast float16."""
    if stored not in {torch.float32, torch.bfloat16, torch.float16}:
        return torch.bfloat16
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def _quantize_step(spec: JobSpec) -> Quantize:
    return next(step for step in spec.steps if isinstance(step, Quantize))


def _param(spec: JobSpec, name: str) -> str:
    """A field of the quantize step as the request names it; other fields as they are."""
    number = spec.steps.index(_quantize_step(spec))
    return f"steps.{number}.{name}" if name in type(spec.steps[number]).model_fields else name


def _open(inputs: Inputs) -> SourceModel:
    if not has_legacy_weights_only(inputs.model):
        return open_model(inputs.model)
    converted = inputs.work / "source"
    if not (converted / "complete").exists():
        convert_legacy(inputs.model, converted)
        (converted / "complete").touch()
    return open_model(converted)


@dataclass
class _Clock:
    """Wall seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)


class _Texts:
    """The token batches of a job."""

    def __init__(self, inputs: Inputs, frame: Frame) -> None:
        spec, step = inputs.spec, _quantize_step(inputs.spec)
        tokenizer: Any = AutoTokenizer.from_pretrained(inputs.model, trust_remote_code=False)
        self.asked = spec.data.sequence_length
        self.length = min(self.asked, frame.max_positions or self.asked)
        self.samples = spec.data.samples
        self.calibration: Calibration | None = None
        self.windows: Windows | None = None
        if step.needs_calibration:
            self.calibration = calibration_batches(
                tokenizer, inputs.calibration_text, spec.data.source, spec.data.samples, self.length, spec.seed
            )
        if spec.evaluation.perplexity or spec.evaluation.divergence:
            own = inputs.evaluation_text is not None
            self.windows = evaluation_windows(
                tokenizer,
                inputs.evaluation_text if own else inputs.calibration_text,
                spec.evaluation.source if own else spec.data.source,
                not own,
                spec.evaluation.samples,
                self.length,
                spec.evaluation.stride,
            )
        self.widest = max(site.columns for n in range(frame.count) for site in frame.sites(n))
        vocabulary = int(frame.model.config.vocab_size)
        for ids in (text.ids for text in (self.calibration, self.windows) if text):
            if int(ids.max()) >= vocabulary:
                raise ModelMalformed(
                    f"the tokenizer gives id {int(ids.max())}, but the model knows only {vocabulary} tokens; "
                    "tokenizer and weights are not of one model"
                )

    def warn(self, notify: Notify) -> list[str]:
        """What the user should know of these texts; told as events and kept for the report."""
        warnings = []
        if self.length < self.asked:
            warnings.append(f"sequence_length {self.asked} was cut to the model's {self.length} positions")
        if self.calibration is not None:
            count, length = self.calibration.ids.shape
            if count < self.samples or length < self.length:
                warnings.append(
                    f"the calibration text gave {count} sequences of {length} tokens, fewer than the {self.samples} of "
                    f"{self.length} asked for"
                )
            if count * length < TOKENS_PER_INPUT * self.widest:
                warnings.append(
                    f"{count * length:,} calibration tokens are few for layers with {self.widest:,} inputs; below "
                    f"{TOKENS_PER_INPUT * self.widest:,} the rounding fits the sample rather than the language"
                )
        if any(text.text.generic for text in (self.calibration, self.windows) if text):
            warnings.append(GENERIC_WARNING)
        for warning in warnings:
            notify.event("warning", warning)
        return warnings


def _fingerprint(inputs: Inputs, source: SourceModel, texts: _Texts) -> str:
    """Of all that decides the codes, so that leavings of another recipe, model or text are not resumed from."""
    parts = {
        "steps": [step.model_dump(mode="json") for step in inputs.spec.steps],
        "model": [inputs.revision, source.weight_bytes, sorted((n, str(e.shape)) for n, e in source.entries.items())],
        "calibration": texts.calibration.text.sha256 if texts.calibration else None,
        "windows": texts.windows.text.sha256 if texts.windows else None,
        "device": inputs.device,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Written:
    """Everything that the end of a job needs: writes the directories, has them certified, tells the story."""

    inputs: Inputs
    source: SourceModel
    model: QuantizedModel
    blocks: list[Block]
    texts: _Texts
    measured: Measured | None
    warnings: list[str]

    def export(self, notify: Notify) -> dict[Format, Path]:
        directories: dict[Format, Path] = {}
        for name in self.inputs.spec.formats:
            directories[name] = self.inputs.out / name
            layout(name).write(self.source, self.model, directories[name], notify)
        return directories

    def certify(self, directories: dict[Format, Path], frame: Frame, notify: Notify) -> list[Certificate]:
        return [
            certificate
            for name, directory in directories.items()
            for certificate in certify(
                directory,
                name,
                expected=self.measured.nll_after if self.measured else None,
                windows=self.texts.windows,
                source_bytes=self.source.weight_bytes,
                dtype=frame.dtype,
                device=frame.device.type,
                vllm_python=self.inputs.vllm_python,
                notify=notify,
            )
        ]

    def report(
        self, directories: dict[Format, Path], certificates: list[Certificate], clock: _Clock, frame: Frame
    ) -> Report:
        inputs, spec = self.inputs, self.inputs.spec
        quality = self.measured.quality if self.measured else None
        return Report(
            job=inputs.job_id,
            squeeze=__version__,
            libraries={name: version(name) for name in LIBRARIES},
            device=_device_name(frame.device),
            source=Source(
                model=inputs.model_name,
                revision=inputs.revision,
                architecture=str(self.source.config["model_type"]),
                parameters=self.source.parameters,
                bytes=self.source.weight_bytes,
                dtype=str(self.source.dtype).removeprefix("torch."),
                license=inputs.license,
            ),
            recipe=[step.model_dump(mode="json") for step in spec.steps],
            seed=spec.seed,
            calibration=self.texts.calibration.text if self.texts.calibration else None,
            quality=quality,
            bits_per_weight=self.model.bits_per_weight,
            sizes=[self._size(name, directory) for name, directory in directories.items()],
            blocks=self.blocks,
            damping_escalations=sum(layer.damping_escalations for block in self.blocks for layer in block.layers),
            certificates=certificates,
            warnings=self.warnings,
            spent=Spent(
                seconds=clock.seconds,
                cpu_seconds=round(cpu_seconds(), 3),
                gpu_seconds=round(clock.seconds["compressing"], 3) if frame.device.type == "cuda" else 0.0,
                peak_host_bytes=peak_host_bytes(),
                peak_gpu_bytes=peak_gpu_bytes(),
                certifier_peak_host_bytes=max((one.peak_host_bytes or 0 for one in certificates), default=0) or None,
            ),
        )

    def _size(self, name: Format, directory: Path) -> Size:
        weights = weight_bytes(directory)
        if weights >= self.source.weight_bytes:
            raise CertificationFailed(
                f"the {name} weights take {weights:,} bytes, no fewer than the source's {self.source.weight_bytes:,}: "
                "use fewer bits or larger groups"
            )
        whole = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        return Size(format=name, bytes=whole, weight_bytes=weights, ratio=self.source.weight_bytes / weights)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _result(report: Report, directories: dict[Format, Path]) -> Result:
    quality = report.quality
    certified: dict[str, dict[str, str]] = {name: {} for name in directories}
    for one in report.certificates:
        certified[one.format][one.consumer] = one.outcome if one.outcome != "failed" else f"failed: {one.detail}"
    return Result(
        source_bytes=report.source.bytes,
        result_bytes={size.format: size.bytes for size in report.sizes},
        compression_ratio=max(size.ratio for size in report.sizes),
        bits_per_weight=report.bits_per_weight,
        perplexity_before=quality.perplexity_before if quality else None,
        perplexity_after=quality.perplexity_after if quality else None,
        divergence_nats=quality.divergence_nats if quality else None,
        top1_agreement=quality.top1_agreement if quality else None,
        certified=certified,
    )
