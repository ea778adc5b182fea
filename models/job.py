"""What every job is given and leaves, whatever its steps: its inputs, its outcome, the parts of its report."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from models.files.checkpoint import SourceModel
from models.formats.directory import weight_bytes
from models.prune.factors.handed import HandedFactors
from models.streaming.snapshots import SNAPSHOT_SECONDS
from squeeze.errors import CertificationFailed, SqueezeError
from squeeze.names import Format
from squeeze.objects import Result
from squeeze.reports.report import Report, Size, Source
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.every import Step
from squeeze.steps.merging import Merge
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train

LIBRARIES = (
    "torch",
    "transformers",
    "compressed-tensors",
    "gptqmodel",
    "bitsandbytes",
    "gguf",
    "onnx",
    "safetensors",
    "tokenizers",
)


@dataclass(frozen=True)
class Named:
    """A further model that the job names, as it lies on this disk. name, revision: as of the job's own."""

    directory: Path
    name: str
    revision: str | None = None


@dataclass(frozen=True)
class Inputs:
    """model: the source's directory. work: kept between attempts, so that the next one resumes. out: emptied first.

    calibration_text, evaluation_text: JSONL, plain text or parquet, or a directory of such files; None: the generic
    text, or a held-out part of calibration_text. Their origins: what the report calls them, where the request's own
    words say too little. model_name: as the user named it, without anything private.
    merged: what a step merges into the model, in the order of its `models`.
    digest: of the files of a model that has no revision and never changes. student: of the model that learns from this
    one, where the job names it; its name, revision and digest as the model's.
    original: what the result is compared with, where an earlier step changed the model. teacher: what it was before
    anything was taken from it; None: nothing was. factors: of linears of the model that learns, where an earlier step
    wrote them so. goes_on: another round follows this one.
    consumers: Pythons of environments that results are loaded in, by the consumer's name. activation_bytes: see
    `engine.quantize`.
    """

    spec: JobSpec
    model: Path
    model_name: str
    work: Path
    out: Path
    device: str
    job_id: str
    revision: str | None = None
    license: str | None = None
    calibration_text: Path | None = None
    evaluation_text: Path | None = None
    consumers: Mapping[str, Path] = field(default_factory=dict)
    snapshot_seconds: float = SNAPSHOT_SECONDS
    activation_bytes: int | None = None
    merged: tuple[Named, ...] = ()
    original: Path | None = None
    teacher: Path | None = None
    factors: HandedFactors | None = None
    goes_on: bool = False
    student: Path | None = None
    student_name: str | None = None
    student_revision: str | None = None
    digest: str | None = None
    student_digest: str | None = None
    calibration_origin: str | None = None
    evaluation_origin: str | None = None

    @property
    def identity(self) -> str | None:
        """Tells the model from any other, wherever it lies; None: a directory, whose files may change in place."""
        return self.revision or self.digest

    @property
    def student_identity(self) -> str | None:
        return self.student_revision or self.student_digest


@dataclass(frozen=True)
class Outcome:
    """directories: a model directory for each format, beside `report.json`."""

    directories: dict[Format, Path]
    report: Report
    result: Result


def libraries(*more: str) -> dict[str, str]:
    """Versions of what a result depends on. more: beside what every job uses."""
    return {name: version(name) for name in (*LIBRARIES, *more)}


def source_part(inputs: Inputs, source: SourceModel) -> Source:
    return Source(
        model=inputs.model_name,
        revision=inputs.revision,
        architecture=str(source.config["model_type"]),
        parameters=source.parameters,
        bytes=source.weight_bytes,
        dtype=str(source.dtype).removeprefix("torch."),
        license=inputs.license,
    )


def size_part(name: Format, directory: Path, source_bytes: int) -> Size:
    """source_bytes: of the source's weights. Raises CertificationFailed where the result of a compression is larger."""
    weights = weight_bytes(directory)
    if weights >= source_bytes and name not in ("safetensors", "safetensors-zst", "peft"):  # as the certifier has it
        raise CertificationFailed(
            f"the {name} weights take {weights:,} bytes, no fewer than the source's {source_bytes:,}: "
            "use fewer bits, larger groups or a smaller share of the parameters"
        )
    whole = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    ratio = None if name == "peft" else source_bytes / weights
    return Size(format=name, bytes=whole, weight_bytes=weights, ratio=ratio)


def result_of(report: Report, directories: Mapping[Format, Path]) -> Result:
    """The headline."""
    quality, training, quantized = report.quality, report.training, report.bits_per_weight is not None
    smaller = (
        quantized
        or (report.factoring is not None and "onnx" in directories)
        or report.slimming is not None
        or bool(report.rounds)
        or "safetensors-zst" in directories
        or (training is not None and training.distillation is not None)
    )
    certified: dict[str, dict[str, str]] = {name: {} for name in directories}
    for one in report.certificates:
        certified[one.format][one.consumer] = one.outcome if one.outcome != "failed" else f"failed: {one.detail}"
    return Result(
        source_bytes=report.source.bytes,
        result_bytes={size.format: size.bytes for size in report.sizes},
        compression_ratio=max((size.ratio for size in report.sizes if size.ratio), default=None) if smaller else None,
        bits_per_weight=report.bits_per_weight,
        sparsity=report.sparsity.of_model if report.sparsity else None,
        perplexity_before=quality.perplexity_before if quality else None,
        perplexity_after=quality.perplexity_after if quality else None,
        divergence_nats=quality.divergence_nats if quality else None,
        top1_agreement=quality.top1_agreement if quality else None,
        loss_before=training.loss_before if training else None,
        loss_after=training.loss_after if training else None,
        accuracy_before=training.accuracy_before if training else None,
        accuracy_after=training.accuracy_after if training else None,
        certified=certified,
    )


def training_step(spec: JobSpec) -> Train | None:
    return next((step for step in spec.steps if isinstance(step, Train)), None)


def merging_step(spec: JobSpec) -> Merge | None:
    return next((step for step in spec.steps if isinstance(step, Merge)), None)


def compress_step(spec: JobSpec) -> Compress:
    """The last that goes through the model block by block."""
    return spec.compressing[-1]


def slimming_step(spec: JobSpec) -> Slim | None:
    return next((step for step in spec.steps if isinstance(step, Slim)), None)


def param_of(spec: JobSpec, name: str, step: Step | None = None) -> str:
    """A field of a step, by default of the last that compresses, as the request names it; other fields as they are."""
    number = spec.steps.index(step or compress_step(spec))
    return f"steps.{number}.{name}" if name.partition(".")[0] in type(spec.steps[number]).model_fields else name


@contextmanager
def params_named(spec: JobSpec, step: Step | None = None) -> Iterator[None]:
    """Errors that name a field of the step name it as the request does."""
    try:
        yield
    except SqueezeError as error:
        error.param = error.param and param_of(spec, error.param, step)
        raise
