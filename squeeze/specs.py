"""What a user asks for: `JobSpec` and its parts, validated whole before anything runs.

Importable without torch. Every check that needs no look at the model is made here, so that the service and the client
refuse the same things with the same words.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema, field_validator, model_validator

from squeeze.compressing import Compress
from squeeze.descent import Auto, or_auto
from squeeze.distillation import Distill, Hidden, OnPolicy
from squeeze.domains import refuse_unweighable
from squeeze.factoring import SVD
from squeeze.finetuning import Adapters, Finetune, Head, QLoRA
from squeeze.formats import holders
from squeeze.merging import Merge
from squeeze.names import names_a_model
from squeeze.slimming import Slim
from squeeze.sparsifying import Sparsify
from squeeze.steps import QAT, Format, Quantize, Step
from squeeze.training import Train
from squeeze.trimming import refuse_misplaced_trimming
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


def _refuse_unshared(step: Train, gpus: int) -> None:
    if gpus <= 1 and step.sharding != "auto":
        raise ValueError(f"sharding {step.sharding!r} says what several GPUs hold: set limits.gpus to 2 or more")
    if gpus > 1 and (step.optimizer != "adamw" or step.precision == "fp16"):
        what = step.optimizer if step.optimizer != "adamw" else "fp16"
        raise ValueError(f"{what} is computed on one GPU alone: set limits.gpus to 1")
    if isinstance(step, QLoRA) and step.sharding not in ("auto", "ddp"):
        raise ValueError(
            f"rounded weights are whole on every GPU, and {step.sharding} would take them apart: set sharding to ddp"
        )
    if isinstance(step, Hidden | OnPolicy) and step.sharding not in ("auto", "ddp"):
        raise ValueError(
            f"the teacher of {step.method} stands whole on every GPU, beside a student that does too: set sharding to "
            "ddp, or take the method logits"
        )
    if gpus > 1 and step.micro_batch_size == "auto":
        raise ValueError("micro_batch_size `auto` is tried on one GPU: set limits.gpus to 1, or say a number")
    if step.batch_size != "auto" and gpus > step.batch_size:
        raise ValueError(f"a batch of {step.batch_size} sequences can't be dealt out to {gpus} GPUs: make it larger")
    if step.sharding == "hybrid" and gpus % 2:
        raise ValueError(f"sharding `hybrid` makes two groups of equal size: {gpus} GPUs can't be halved")


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
    def _quantizes_once_and_last(self) -> Self:
        quantizing = [n for n, step in enumerate(self.steps) if isinstance(step, Quantize)]
        if len(quantizing) > 1:
            raise ValueError(
                f"steps {quantizing} all quantize; quantized weights can't be compressed again: keep one of them"
            )
        if quantizing and quantizing[0] != len(self.steps) - 1:
            raise ValueError("quantized weights can't be worked on again: let the step that quantizes be the last")
        for step in self.steps:
            if isinstance(step, Quantize) and step.by_block and self.limits.gpus > 1:
                raise ValueError(f"{step.method} works on whole blocks, which GPUs can't share: set limits.gpus to 1")
            if isinstance(step, QAT) and self.limits.gpus > 1:
                raise ValueError(f"{step.method} trains on one GPU: set limits.gpus to 1")
        return self

    @model_validator(mode="after")
    def _keeps_zeros(self) -> Self:
        zeroing = [(n, step) for n, step in enumerate(self.steps) if isinstance(step, Sparsify)]
        for number, _ in zeroing:
            for step in self.steps[number + 1 :]:
                if isinstance(step, Merge | Slim) or (isinstance(step, Train) and not step.keeps_zeros):
                    raise ValueError(
                        f"what step {number} zeroes, {step.method} would fill or move: let it come before that, or "
                        "leave it out; of the steps that train, `full`, `last_layers` and distillations keep zeros"
                    )
        for step in self.steps if zeroing else ():
            if isinstance(step, Quantize) and step.zeroed:
                raise ValueError(
                    f"step {zeroing[0][0]} zeroes weights, which {step.method} keeps: leave `sparsity` and `pattern` "
                    f"of {step.method} out, or let it do both"
                )
        for (former, one), (latter, other) in pairwise(zeroing):
            if not any(isinstance(step, Train) for step in self.steps[former:latter]):
                raise ValueError(
                    f"steps {[former, latter]} both zero weights and nothing is learned between them: keep one of "
                    "them, with the share that you want, or let a step between them train"
                )
            if other.sparsity <= one.sparsity:
                raise ValueError(
                    f"step {latter} zeroes no more than step {former} did: {other.sparsity:g} after {one.sparsity:g}; "
                    "let the share grow"
                )
        return self

    @model_validator(mode="after")
    def _factors_once_before_quantizing(self) -> Self:
        factoring = [n for n, step in enumerate(self.steps) if isinstance(step, SVD)]
        if len(factoring) > 1:
            raise ValueError(f"steps {factoring} all factor: keep one of them, with the share that you want")
        if factoring and any(isinstance(step, Sparsify) for step in self.steps):
            raise ValueError("products of factors have no zeros, and zeros no low rank: keep one of svd and the other")
        if factoring and not all(isinstance(step, Quantize) for step in self.steps[factoring[0] + 1 :]):
            raise ValueError(
                "the step after one that factors would fill the ranks again: train before it, in this job or another; "
                "only a step that quantizes may follow it"
            )
        return self

    @model_validator(mode="after")
    def _trains_on_examples(self) -> Self:
        training = [step for step in self.steps if isinstance(step, Train)]
        if self.data.sequence_length == "auto" and not any(isinstance(step, Finetune) for step in training):
            raise ValueError("data.sequence_length `auto` looks at training examples: say a number, or finetune")
        for step in training:
            if isinstance(step, Finetune) and (self.data.source is None or self.data.source == SELF):
                raise ValueError(
                    f"{step.method} learns from examples: name a file (file-…) or a dataset (hub:…) as data.source"
                )
            if step is not self.steps[-1] and isinstance(step, Adapters) and not step.mergeable:
                raise ValueError(
                    f"what {step.method} learns can't be merged into weights that a step goes on with: let it be the "
                    "last step"
                )
            if isinstance(step, Distill) and self.data.source == SELF:
                raise ValueError("a student learns from text that is there: name a file or a dataset as data.source")
            if step is not self.steps[-1] and isinstance(step, Head):
                raise ValueError("head makes a classifier, which no step goes on with: let it be the last step")
            if step is not self.steps[-1] and not step.whole:
                raise ValueError(f"the step after {step.method} goes on with a whole model: set its `merge` to true")
            _refuse_unshared(step, self.limits.gpus)
        return self

    @model_validator(mode="after")
    def _merges_once_and_first(self) -> Self:
        merging = [n for n, step in enumerate(self.steps) if isinstance(step, Merge)]
        if merging and merging != [0]:
            raise ValueError(
                "models are merged that were made from the job's model, as it comes: let one step merge, the first one"
            )
        if merging and "peft" in self.formats:
            raise ValueError(
                "an adapter that is trained on what was merged would go with a model that is not written: let the step "
                "that trains merge it, and take safetensors alone as format"
            )
        if merging and isinstance(self.steps[-1], Adapters) and not self.steps[-1].merge:
            raise ValueError(
                f"what {self.steps[-1].method} learns goes with the merged model, which is not written alone: set its "
                "`merge` to true"
            )
        if merging and len(self.steps) == 1 and self.limits.gpus > 1:
            raise ValueError("merging is done by one process: set limits.gpus to 1")
        return self

    @model_validator(mode="after")
    def _writes_what_it_made(self) -> Self:
        last = self.steps[-1]
        changed = any(isinstance(step, Slim | Train) for step in self.steps[:-1])
        if changed and isinstance(last, Adapters) and ("peft" in self.formats or not last.merge):
            raise ValueError(
                "an adapter that is trained on what a step made would go with a model that is not written: let the "
                "step that trains merge it, and take safetensors alone as format"
            )
        if len(self.steps) == 1 and isinstance(last, Slim) and self.limits.gpus > 1:
            raise ValueError("a model is made smaller by one process: set limits.gpus to 1")
        return self

    @model_validator(mode="after")
    def _says_who_learns(self) -> Self:
        pruned = False
        for number, step in enumerate(self.steps):
            if isinstance(step, Distill) and step.student.named == pruned:
                raise ValueError(
                    f"steps.{number}: the model that the steps before pruned is who learns: leave `student` out"
                    if pruned
                    else f"steps.{number}.student: say who learns, either `layers`, so many blocks of the teacher, or "
                    "`model`; or let a step before prune the model"
                )
            pruned |= isinstance(step, Sparsify | Distill) or (isinstance(step, Slim) and not step.equivalent)
        return self

    @model_validator(mode="after")
    def _trims_to_a_text(self) -> Self:
        refuse_misplaced_trimming(self.steps, told=self.data.source not in (None, SELF))
        return self

    @model_validator(mode="after")
    def _weighs_what_was_lost(self) -> Self:
        refuse_unweighable(self.steps, named=self.data.source not in (None, SELF))
        return self

    @model_validator(mode="after")
    def _strides_within_a_window(self) -> Self:
        stride = self.evaluation.stride
        if stride is not None and stride > self.data.length:
            raise ValueError(f"evaluation.stride is {stride}, more than data.sequence_length allows")
        return self
