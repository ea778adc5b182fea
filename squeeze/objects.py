"""What the service answers: jobs, events, artifacts, files, methods, plans, and the lists that hold them."""

from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, computed_field

from squeeze.names import Format
from squeeze.specs.choosing import Choice
from squeeze.specs.job_spec import Data, Evaluation, Limits
from squeeze.specs.saving import savings
from squeeze.steps.every import Step


class Status(StrEnum):
    queued = "queued"
    running = "running"
    cancelling = "cancelling"
    cancelled = "cancelled"
    succeeded = "succeeded"
    failed = "failed"


FINAL = frozenset({Status.cancelled, Status.succeeded, Status.failed})


class Stage(StrEnum):
    pulling = "pulling"
    planning = "planning"
    loading = "loading"
    merging = "merging"
    calibrating = "calibrating"
    compressing = "compressing"
    training = "training"
    evaluating = "evaluating"
    exporting = "exporting"
    certifying = "certifying"
    uploading = "uploading"


class Answer(BaseModel):
    """Base of all answers: a client ignores fields that a newer server adds."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Progress(Answer):
    fraction: float = Field(0.0, ge=0, le=1, description="Of the whole job.")
    done: int | None = Field(None, description="Units of the present stage that are done.")
    total: int | None = None
    unit: str | None = Field(None, description="What is counted: blocks, bytes, files …")
    eta_seconds: float | None = Field(None, description="Estimated seconds until the job ends.")


class JobError(Answer):
    code: str
    message: str
    retryable: bool = False


class Usage(Answer):
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_gpu_bytes: int = 0
    peak_host_bytes: int = 0
    energy_wh: float | None = Field(None, description="None where the machine doesn't tell.")


class Result(Answer):
    """The headline of the report."""

    source_bytes: int = Field(description="Of the source's weights.")
    result_bytes: dict[str, int] = Field(description="Bytes of the model directory, by format.")
    compression_ratio: float | None = Field(
        description="Weight bytes of the source over those of the smallest result; tokenizer and settings don't count. "
        "Null where nothing was made smaller."
    )
    bits_per_weight: float | None = Field(
        description="Of the compressed linears, scales and zeros counted in. Null where nothing was quantized."
    )
    sparsity: float | None = Field(
        None, description="Share of all parameters that a step set to zero. They take as many bytes as before."
    )
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    divergence_nats: float | None = Field(None, description="Mean KL(original ‖ result) a token.")
    top1_agreement: float | None = None
    loss_before: float | None = Field(None, description="Held-out loss of the examples before a step that trains.")
    loss_after: float | None = Field(None, description="And after it, nats a learned token.")
    accuracy_before: float | None = Field(
        None, description="Share of the held-out examples whose label is told, before a step that learns labels."
    )
    accuracy_after: float | None = Field(None, description="And after it.")
    certified: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="format -> consumer -> `passed`, `not checked` or why not."
    )


class Job(Answer):
    id: str
    object: Literal["job"] = "job"
    status: Status
    stage: Stage | None = None
    progress: Progress = Progress()
    attempt: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    model: str
    model_revision: str | None = Field(None, description="Commit that the model's id resolved to.")
    steps: tuple[Step, ...]
    data: Data
    evaluation: Evaluation
    formats: tuple[Format, ...]
    limits: Limits
    seed: int
    priority: int
    metadata: dict[str, str]
    error: JobError | None = None
    result: Result | None = None
    usage: Usage | None = None

    @computed_field(description="What the steps make smaller or faster, and what they don't.")  # type: ignore[prop-decorator]
    @property
    def saves(self) -> list[str]:
        return savings(self.steps, self.formats)


class Event(Answer):
    id: int = Field(description="Grows within the job; send the last one seen as `after` or `Last-Event-ID`.")
    object: Literal["event"] = "event"
    job_id: str
    attempt: int
    created_at: datetime
    type: str = Field(description="status, stage, progress, warning or info.")
    message: str
    data: dict[str, Any] = Field(default_factory=dict)


class Artifact(Answer):
    object: Literal["artifact"] = "artifact"
    filename: str = Field(description="Relative path, for example `gptq/model.safetensors`.")
    bytes: int
    sha256: str
    format: str
    download_url: str


class File(Answer):
    id: str
    object: Literal["file"] = "file"
    filename: str
    bytes: int
    sha256: str
    purpose: Literal["calibration", "training", "evaluation"]
    created_at: datetime


class Deleted(Answer):
    id: str
    object: str
    deleted: Literal[True] = True


class Load(Answer):
    """One consumer that was given one result in a fresh process."""

    settings: str = Field(description="Of the step, for example `bits 4, group_size 128`.")
    format: str
    consumer: str
    version: str | None
    outcome: Literal["passed", "failed", "not checked"]


class Method(Answer):
    kind: str
    method: str
    object: Literal["method"] = "method"
    description: str
    parameters: dict[str, Any] = Field(description="JSON schema of the step.")
    architectures: list[str]
    formats: dict[str, dict[str, Any]] = Field(
        description="format -> what of the method it can hold, and who loads it."
    )
    needs: list[str] = Field(description="What it needs: `calibration data`, `gpu` …")
    loads: list[Load] = Field(description="Who loaded what on the bundled model, when this release was made.")


class Obstacle(Answer):
    code: str
    message: str
    param: str | None = None


class Duration(Answer):
    """Estimated seconds of a job, from its start until its results are certified; fetching and storing files is not
    counted. It grows linearly with the blocks: `likely` = `fixed` + `per_block` · number of blocks.
    """

    low: float
    likely: float
    high: float
    fixed: float = Field(description="Of `likely`, what does not grow with the number of blocks.")
    per_block: float = Field(description="Of `likely`, what one decoder block takes, on average.")
    stages: dict[str, float] = Field(description="`likely`, by stage as the report has them.")
    basis: str = Field(description="What the estimate rests on: finished jobs of this service, or a reference machine.")


class Plan(Answer):
    """What a spec would need, and what stands in its way; nothing was run."""

    object: Literal["plan"] = "plan"
    feasible: bool
    obstacles: list[Obstacle]
    model_revision: str | None = None
    parameters: int | None = Field(None, description="Weights of the source model.")
    source_bytes: int | None = None
    result_parameters: int | None = Field(
        None, description="Exactly, of a model that the job makes smaller; null of other jobs."
    )
    most_result_parameters: int | None = Field(
        None,
        description="Instead, where it hangs on what the job's text needs or shows how small the model is: at most so "
        "many. The report says how many there are.",
    )
    result_parameters_estimated: bool = Field(
        False, description="With a `speed_target`, by multiply-adds: what meets it is known once it is measured."
    )
    saves: list[str] = Field(
        default_factory=list, description="What the steps make smaller or faster, and what they don't."
    )
    result_bytes: dict[str, int] = Field(default_factory=dict, description="Estimated bytes by format.")
    host_bytes: int | None = Field(
        None, description="Estimated peak host memory of all processes of the job, where a worker runs it on its CPU."
    )
    least_host_bytes: int | None = Field(
        None,
        description="As `host_bytes`, with activations on disk and each block gone through several times: so does a "
        "worker where half of its free memory does not hold them.",
    )
    seconds: Duration | None = Field(None, description="Estimated time; null where the headers don't tell enough.")
    disk_bytes: int | None = Field(None, description="Estimated scratch and cache space.")
    chosen: list[Choice] = Field(
        default_factory=list,
        description="What an `auto` of the request comes to, where that is known before the examples are read.",
    )


Item = TypeVar("Item")


class Page(Answer, Generic[Item]):
    """A page of a list; ask for the next one with `after=last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, data: list[Item], has_more: bool, name: Callable[[Item], str]) -> Self:
        """name: what `after` is told of an item."""
        first, last = (name(data[0]), name(data[-1])) if data else (None, None)
        return cls(data=data, has_more=has_more, first_id=first, last_id=last)


class ProblemDetail(Answer):
    """The `error` member, so that OpenAI-style clients read problems too."""

    message: str
    type: str
    param: str | None = None
    code: str


class Problem(Answer):
    """`application/problem+json` (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    error: ProblemDetail
