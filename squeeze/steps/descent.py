"""What everything shares that goes down a gradient: rates, batches, precision."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from squeeze.wire import Wire

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Auto = Literal["auto"]
AT_ITS_HIGHEST = "At its highest. `auto`: by a rule that the report states."


def or_auto(takes: str) -> WrapValidator:
    """Has what is neither a number in range nor `auto` refused once, not once for each. takes: which, in words."""

    def refuse(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(f"it takes {takes}, or `auto`") from None

    return WrapValidator(refuse)


Rate = Annotated[Annotated[float, Field(gt=0, le=10)] | Auto, or_auto("a number above 0, at most 10")]
Count = Annotated[Annotated[int, Field(ge=1, le=65536)] | Auto, or_auto("a whole number from 1 to 65536")]


class Descent(Wire):
    """What everything shares that goes down a gradient.

    A batch is what one step of the optimizer looks at; it goes through the model in micro-batches, whose gradients are
    added up, each token with the same weight.
    """

    learning_rate: Rate = Field(2e-4, description=AT_ITS_HIGHEST)
    schedule: Schedule = Field(
        "cosine",
        description="How the learning rate falls after the warm-up, to nothing at the end; `constant`: it stays.",
    )
    warmup: float = Field(
        0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises from nothing; rounded up."
    )
    batch_size: Count = Field(
        8,
        description="Sequences of a step of the optimizer; packed, each is filled up to `data.sequence_length` tokens. "
        "`auto`: by a rule that the report states.",
    )
    micro_batch_size: Count | None = Field(
        None,
        description="Sequences that go through the model together: less memory, the same result but for rounding. Left "
        "out: all of a batch. `auto`: as many as fit, found by trying.",
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled, of AdamW (arXiv 1711.05101).")
    clip_norm: float | None = Field(
        1.0, gt=0, description="The most that the norm of a step's whole gradient may be. Null: whatever it is."
    )
    precision: Precision = Field(
        "auto",
        description="Of the computation. What is trained, and the optimizer's state, is float32 in any case. `auto`: "
        "bf16 on a GPU that can, else fp32. `fp16`: with a scaled loss, on a GPU.",
    )
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, a third more time."
    )

    @model_validator(mode="after")
    def _micro_batches_make_a_batch(self) -> Self:
        if "auto" in (self.micro_batch_size, self.batch_size) or self.micro_batch_size is None:
            return self
        if self.together > self.sequences:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, more than a batch of {self.batch_size} has sequences"
            )
        return self

    @property
    def rate(self) -> float:
        """The learning rate, once it is chosen."""
        return float(_chosen(self.learning_rate))

    @property
    def sequences(self) -> int:
        """Of a batch, once that is chosen."""
        return int(_chosen(self.batch_size))

    @property
    def micro(self) -> int | None:
        """Sequences that go through the model together, once that is chosen. None: all of a batch."""
        return None if self.micro_batch_size is None else int(_chosen(self.micro_batch_size))

    @property
    def together(self) -> int:
        """As `micro`, in figures."""
        return self.micro or self.sequences


def _chosen(value: float | Auto) -> float:
    if value == "auto":
        raise ValueError("what `auto` comes to is not chosen yet")
    return value
