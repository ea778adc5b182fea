"""What the steps that train share, whatever they train on: its fields, with units, ranges and defaults.

The methods are in `finetuning` and `distillation` beside this module; `Rounded` is the part of `qat` that trains.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from squeeze.steps.descent import Descent
from squeeze.steps.sharding import Sharding

Written = Literal["peft", "gptq", "safetensors", "safetensors-zst"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit", "galore", "badam"]
USUAL_EPOCHS = 1.0


class Train(Descent):
    """What every step that trains shares.

    How long it goes on is said by one of `steps`, `epochs` and `tokens`.
    """

    kind: Literal["finetune", "distill", "prune"] = "finetune"
    method: str
    steps: int | None = Field(None, ge=1, le=10_000_000, description="Steps of the optimizer.")
    epochs: float | None = Field(
        None, gt=0, le=1000, description="How often each example is seen. Left out, with `steps` and `tokens`: once."
    )
    tokens: int | None = Field(None, ge=1, description="Tokens to train on; ends with the step that reaches them.")
    optimizer: Optimizer = Field(
        "adamw",
        description="`adamw`: 8 bytes for every number that learns. `adamw8bit`: 2 (arXiv 2110.02861); "
        "`paged_adamw8bit`: in host memory where the GPU's is full. `galore`: AdamW on a projection of the gradients "
        "of the decoder blocks' matrices (arXiv 2403.03507). `badam`: one decoder block at a time, with gradients and "
        "state for this alone (arXiv 2404.02827).",
    )
    projection_rank: int = Field(128, ge=1, le=8192, description="Of `galore`: of the projection.")
    projection_refresh: int = Field(200, ge=1, le=100_000, description="Of `galore`: steps between two projections.")
    projection_scale: float = Field(
        0.25, gt=0, le=100, description="Of `galore`: what the learning rate of projected gradients is multiplied by."
    )
    block_steps: int = Field(50, ge=1, le=100_000, description="Of `badam`: steps until the next block's turn.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep a moving average of what learns, in which the average so far counts this much after each "
        "step (less in the first ones); it is what is evaluated and kept. For example 0.999.",
    )
    packing: bool = Field(
        True,
        description="Put several short examples into one sequence. They don't see each other, and positions count from "
        "the start of each.",
    )
    evaluate_every: int | None = Field(
        None,
        ge=1,
        description="Steps between two looks at the held-out loss; the weights of the lowest are kept. Left out: "
        "before and after alone, and the last weights are kept.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="With `evaluate_every`: stop after so many looks in a row that found no lower held-out loss.",
    )
    domain_column: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="The column (or JSONL field) that names the domain of a record. Domains are then weighed by what "
        "was lost in them (arXiv 2310.06694, section 2.2): at every look at the held-out loss the share of each in "
        "the batches is multiplied by exp(its loss − that of the model before anything was taken from it), where that "
        "is more. Needs `evaluate_every`, and a teacher or a step before that pruned.",
    )
    sharding: Sharding = Field(
        "auto",
        description="With `limits.gpus` above 1, what each GPU holds. `ddp`: all weights. `full`: a part of the "
        "weights, gradients and optimizer state, put together block by block. `hybrid`: the same in two groups, each "
        "of which holds everything. `offload`: as `full`, and what is not at work lies in host memory. `auto`: `ddp` "
        "where weights and state take no more than half of a GPU's free memory, else `full`, or `offload` where the "
        "parts don't fit either. `zero1`, `zero2`, `zero3`: by DeepSpeed, where the worker has it, a part of the "
        "optimizer's state, of the gradients too, of the weights too (arXiv 1910.02054). The losses are the same. "
        "`qlora`, `hidden` and `on_policy` take `ddp` alone: rounded weights and teachers are not taken apart.",
    )
    by_block: ClassVar[bool] = False
    domainless: ClassVar[str | None] = None  # why domains can't be weighed, in words

    @model_validator(mode="after")
    def _says_once_how_long(self) -> Self:
        said = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} all say how long to train: keep one of them")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts looks at the held-out loss: say `evaluate_every` too")
        if self.domain_column is not None and self.domainless is not None:
            raise ValueError(f"{self.domainless}: leave domain_column out")
        if self.domain_column is not None and self.evaluate_every is None:
            raise ValueError(
                "domains are weighed at every look at the held-out loss: say `evaluate_every` beside domain_column"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at text."""
        return True

    @property
    def whole(self) -> bool:
        """Whether it makes a whole model, which other steps can go on with."""
        return True

    @property
    def formats(self) -> tuple[Written, ...]:
        """What a job is written as that ends with this step, where it doesn't say."""
        return ("safetensors",)

    @property
    def writable(self) -> tuple[Written, ...]:
        """What such a job can be written as. Under zstd a plain model is smaller where it has zeros."""
        return (*self.formats, "safetensors-zst") if self.whole and self.keeps_zeros else self.formats

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that an earlier step zeroed are zero in what it makes."""
        return True

    @property
    def keeps_factors(self) -> bool:
        """Whether, where an earlier step wrote linears as factors, both of these learn, so that the rank stays."""
        return False


class Rounded(Descent):
    """What training a model with rounded weights takes, beside the grid that they are rounded to."""

    start: Literal["gptq", "rtn", "autoround"] = Field(
        "gptq",
        description="Whose codes the training starts from, at that method's defaults. `autoround`: learned block by "
        "block first, then all together (the two phases of arXiv 2407.11062).",
    )
    train: Literal["scales", "weights"] = Field(
        "scales",
        description="`scales`: of every group; the codes stay, and the training takes a byte a weight (as arXiv "
        "2407.11062). `weights`: the weights too, with straight-through gradients (LSQ, arXiv 1902.08153): 16 bytes a "
        "weight.",
    )
    distill: bool = Field(
        True,
        description="Learn what the original predicts for each token of the text (its divergence falls); false: the "
        "text itself, without the original in memory.",
    )
    steps: int = Field(100, ge=1, le=1_000_000, description="Steps of the optimizer.")
    batch_size: int = Field(4, ge=1, le=65536, description="Sequences of a step of the optimizer.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Sequences that go through the model together: less memory, the same result but for rounding. Left "
        "out: all of a batch.",
    )
    learning_rate: float = Field(
        0.02,
        gt=0,
        le=1,
        description="At its highest: by how much of its distance to the next one a step may move the last point of a "
        "group's grid.",
    )

    @property
    def descent(self) -> Train:
        """The training, as its loop takes it."""
        shared = {name: getattr(self, name) for name in Descent.model_fields}
        return Train(method="qat", steps=self.steps, **shared)
