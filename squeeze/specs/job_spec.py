"""What a user asks for: `JobSpec` and its parts, validated whole before anything runs.

Importable without torch. Every check that needs no look at the model is made here, so that the service and the client
refuse the same things with the same words.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema, field_validator, model_validator

from squeeze.names import Format, names_a_model
from squeeze.specs import chains
from squeeze.specs.formats import holders
from squeeze.steps.compressing import Compress
from squeeze.steps.descent import Auto, or_auto
from squeeze.steps.distillation import Distill
from squeeze.steps.every import Step
from squeeze.steps.finetuning import Adapters, Finetune, Head
from squeeze.steps.merging import Merge
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train
from squeeze.wire import Wire

USUAL_LENGTH = 2048
SELF = "self"  # the model samples its own text
_FILE = r"file-[0-9a-z]{8,64}"
_NAME = r"[0-9A-Za-z_.-]{1,96}"
_HUB_TEXT = rf"hub:{_NAME}(/{_NAME})?(@[0-9A-Za-z_./-]{{1,128}})?(:{_NAME}(/{_NAME})?)?"

Metadata = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=64)], Annotated[str, StringConstraints(max_length=512)]
]


@dataclass(frozen=True)
class HubText:
    """`hub:org/name[@revision][:part]`. part: `split` or `subset/split`; None: the usual one."""

    repo: str
    revision: str | None
    part: str | None


def hub_text(source: str | None) -> HubText | None:
    """What a source that is a Hub dataset names; None for the others."""
    if source is None or not source.startswith("hub:"):
        return None
    name, _, part = source.removeprefix("hub:").partition(":")
    repo, _, revision = name.partition("@")
    return HubText(repo, revision or None, part or None)


def _names_a_text(value: str) -> str:
    if value == SELF or re.fullmatch(_FILE, value):
        return value
    if not re.fullmatch(_HUB_TEXT, value) or ".." in value:
        raise ValueError(
            "name an uploaded file (file-…), a Hub dataset (hub:org/name, hub:org/name:split or "
            "hub:org/name:subset/split), or self"
        )
    return value


def _names_a_foreign_text(value: str) -> str:
    if value == SELF:
        raise ValueError("a model that is judged on text of its own making looks better than it is; name another text")
    return _names_a_text(value)


_Source = Annotated[
    str,
    AfterValidator(_names_a_text),
    WithJsonSchema({"type": "string", "pattern": f"^({_FILE}|{_HUB_TEXT}|{SELF})$"}),
]
_ForeignSource = Annotated[
    str,
    AfterValidator(_names_a_foreign_text),
    WithJsonSchema({"type": "string", "pattern": f"^({_FILE}|{_HUB_TEXT})$"}),
]
_COLUMN = (
    "The column (or JSONL field) that holds the text, where it is not `text`, `prompt` and `completion`, or `messages`."
)


class Data(Wire):
    """The text that training, calibration and, unless `evaluation` names its own, evaluation look at."""

    source: _Source | None = Field(
        None,
        description="An uploaded file (`file-…`); a Hub dataset (`hub:org/name`, `hub:org/name:split` or "
        "`hub:org/name:subset/split`, with `@revision` after the name where it isn't `main`); or `self`: the model "
        "samples its own calibration text, for which it must fit in memory whole. Left out: a generic text that comes "
        "with the installation; figures on it say little about your own text, and the report says so. A step that "
        "finetunes needs a file or a dataset: text, `prompt` and `completion`, or `messages` of a chat; "
        "`head` needs `text` and `label`.",
    )
    column: str | None = Field(None, min_length=1, max_length=128, description=_COLUMN)
    samples: int = Field(128, ge=1, le=65536, description="Calibration sequences.")
    sequence_length: Annotated[
        Annotated[int, Field(ge=16, le=131072)] | Auto, or_auto("a whole number from 16 to 131072")
    ] = Field(
        USUAL_LENGTH,
        description="Tokens in a sequence; cut to what the model's positions allow, which the report then says. "
        "`auto`, of a step that finetunes: what holds 95 % of the training examples.",
    )

    @property
    def length(self) -> int:
        """Tokens of a sequence; as long as usual where that is not chosen yet."""
        return USUAL_LENGTH if self.sequence_length == "auto" else self.sequence_length


class Evaluation(Wire):
    """What is measured, on held-out text, in the same pass as the compression."""

    perplexity: bool = Field(True, description="Perplexity of the original and of the result.")
    divergence: bool = Field(
        True, description="Kullback–Leibler divergence (nats a token) and top-1 agreement against the original."
    )
    source: _ForeignSource | None = Field(
        None,
        description="An uploaded file (`file-…`) or a Hub dataset (`hub:org/name[:split]`) to evaluate on. Left out: a "
        "held-out part of `data`; of the generic text where that is `self`.",
    )
    column: str | None = Field(None, min_length=1, max_length=128, description=_COLUMN)
    samples: int = Field(32, ge=1, le=65536, description="Evaluation windows.")
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens that a window advances; its last `stride` tokens are scored. Left out: the whole window.",
    )


class Limits(Wire):
    """What the job may use."""

    max_runtime_seconds: int = Field(86400, ge=1, le=30 * 86400, description="Of one attempt; then it fails.")
    gpus: int = Field(
        0,
        ge=0,
        le=16,
        description="0: whatever the worker has (a GPU, or the CPU). 1: a GPU only. More: as many GPUs of one machine "
        "share the batches of a training (see its `sharding`), the calibration and the evaluation text; the result is "
        "the same. The operator has to have set up a worker with so many.",
    )


def _default_formats(fields: dict[str, Any]) -> tuple[Format, ...]:
    """The most widely loaded format that holds what the steps make; of a last step that trains, all that it makes."""
    last = next(iter(reversed(fields.get("steps", ()))), None)
    if isinstance(last, Adapters) and any(isinstance(step, Merge | Slim | Train) for step in fields["steps"][:-1]):
        return ("safetensors",)  # an adapter would go with a model that is not written
    if isinstance(last, Train | Merge | Slim):
        return last.formats
    schemes = [step.scheme() for step in fields.get("steps", ()) if isinstance(step, Compress)]
    return (holders(schemes[-1]) if schemes else ())[:1] or ("compressed-tensors",)


class JobSpec(Wire):
    """One request: a model, an ordered list of steps, what to evaluate, which formats to write."""

    model: str = Field(
        min_length=1,
        max_length=4096,
        description="A Hub id (`org/name` or `org/name@revision`), an earlier job (`job-…`) or, where the operator "
        "allows it, an absolute directory under an allowed root.",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    steps: tuple[Step, ...] = Field(min_length=1, max_length=16)
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    formats: tuple[Format, ...] = Field(
        default_factory=_default_formats,
        min_length=1,
        description="One directory is written for each. Left out: compressed-tensors, or what else holds the result; "
        "of a job that ends with training, `peft` and, where it merges, `safetensors`.",
    )
    limits: Limits = Limits()
    seed: int = Field(0, ge=0, lt=2**63, description="Of the calibration draw, and of what training draws.")
    priority: int = Field(0, ge=-3, le=6, description="Larger runs first; jobs of equal priority in order of arrival.")
    metadata: Metadata = Field(default_factory=dict, max_length=16, description="Yours; lists can be filtered by it.")

    @property
    def models(self) -> dict[str, str]:
        """Every model that has to be there, by the field that names it."""
        named = {"model": self.model}
        for number, step in enumerate(self.steps):
            if isinstance(step, Distill) and step.student.model is not None:
                named[f"steps.{number}.student.model"] = step.student.model
            if isinstance(step, Merge):
                named |= {f"steps.{number}.models.{n}.model": entry.name for n, entry in enumerate(step.models)}
        return named

    @property
    def compressing(self) -> tuple[Compress, ...]:
        """The steps that go through the model block by block, in their order."""
        return tuple(step for step in self.steps if isinstance(step, Compress))

    @property
    def label_column(self) -> str | None:
        """The field of a record that holds its label, where a step learns labels."""
        return next((step.label_column for step in self.steps if isinstance(step, Head)), None)

    @property
    def domain_column(self) -> str | None:
        """The field of a record that names its domain, where a step weighs these."""
        return next((step.domain_column for step in self.steps if isinstance(step, Train)), None)

    @field_validator("model")
    @classmethod
    def _names_a_model(cls, value: str) -> str:
        return names_a_model(value)

    @field_validator("formats")
    @classmethod
    def _names_each_format_once(cls, value: tuple[Format, ...]) -> tuple[Format, ...]:
        if len(set(value)) != len(value):
            raise ValueError("name each format once")
        return value

    @model_validator(mode="after")
    def _columns_are_of_files(self) -> Self:
        for name, part in (("data", self.data), ("evaluation", self.evaluation)):
            if part.column is not None and part.source in (None, SELF):
                raise ValueError(f"{name}.column names a column, but {name}.source names no file or dataset")
        return self

    @model_validator(mode="after")
    def _has_steps_that_go_together(self) -> Self:
        known: dict[str | None, chains.Text] = {None: "generic", SELF: "own"}
        chains.refuse_misplaced(self.steps, known.get(self.data.source, "named"))
        chains.refuse_unwritable(self.steps, self.formats)
        chains.refuse_unshared(self.steps, self.limits.gpus)
        if self.data.sequence_length == "auto" and not any(isinstance(step, Finetune) for step in self.steps):
            raise ValueError("data.sequence_length `auto` looks at training examples: say a number, or finetune")
        return self

    @model_validator(mode="after")
    def _strides_within_a_window(self) -> Self:
        stride = self.evaluation.stride
        if stride is not None and stride > self.data.length:
            raise ValueError(f"evaluation.stride is {stride}, more than data.sequence_length allows")
        return self
