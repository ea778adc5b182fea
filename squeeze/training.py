"""The steps that train, one class per method: what it takes, with units, ranges and defaults.

As with the other steps, `kind` and `method` are the folder and the file in `models/`
(`finetune`, `lora` -> `models/finetune/lora.py`). A new method adds its class here and that file, nothing else.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from squeeze.descent import AT_ITS_HIGHEST, Descent, Rate
from squeeze.sharding import Sharding

Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit", "galore", "badam"]
USUAL_EPOCHS = 1.0


class Train(Descent):
    """What every step that trains shares.

    How long it goes on is said by one of `steps`, `epochs` and `tokens`.
    """

    kind: Literal["finetune", "distill"] = "finetune"
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
    sharding: Sharding = Field(
        "auto",
        description="With `limits.gpus` above 1, what each GPU holds. `ddp`: all weights. `full`: a part of the "
        "weights, gradients and optimizer state, put together block by block. `hybrid`: the same in two groups, each "
        "of which holds everything. `offload`: as `full`, and what is not at work lies in host memory. `auto`: `ddp` "
        "where weights and state take no more than half of a GPU's free memory, else `full`, or `offload` where the "
        "parts don't fit either. `zero1`, `zero2`, `zero3`: by DeepSpeed, where the worker has it, a part of the "
        "optimizer's state, of the gradients too, of the weights too (arXiv 1910.02054). The losses are the same.",
    )
    by_block: ClassVar[bool] = False

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
    def formats(self) -> tuple[Literal["peft", "safetensors"], ...]:
        """What a job is written as that ends with this step."""
        return ("safetensors",)


class Finetune(Train):
    """What every training on the user's own examples shares."""

    kind: Literal["finetune"] = "finetune"


class Adapters(Finetune):
    """Learns something beside the weights, which stay: small, and written apart from them.

    mergeable: whether what it learns can be added to the weights.
    """

    mergeable: ClassVar[bool] = True
    merge: bool = Field(
        False,
        description="Add what was learned to the weights: a plain model in 16 bits, written as `safetensors`, or what "
        "the next step goes on with.",
    )

    @property
    def whole(self) -> bool:
        return self.merge

    @property
    def formats(self) -> tuple[Literal["peft", "safetensors"], ...]:
        return ("peft", "safetensors") if self.merge else ("peft",)


Patterns = tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]


class LowRank(Adapters):
    """Learns a product of two narrow matrices beside each linear layer, whose own weights stay."""

    rank: int = Field(16, ge=1, le=4096, description="Columns of the narrow matrices.")
    alpha: float = Field(
        32.0,
        gt=0,
        description="What was learned is multiplied by `alpha` / `rank`; with `rslora` by `alpha` / √`rank`.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the inputs of each adapter that is dropped.")
    target_modules: Patterns = Field(
        (),
        max_length=64,
        description="Linear layers that get an adapter: shell patterns over their full names, for example `*.q_proj`. "
        "Left out: all linear layers of the decoder blocks. The fused experts of a mixture get none.",
    )
    rslora: bool = Field(False, description="Scale by the root of the rank, for high ranks (arXiv 2312.03732).")
    dora: bool = Field(
        False, description="Learn the length of each row of the weights apart from its direction (arXiv 2402.09353)."
    )


class LoRA(LowRank):
    """Learns a product of two narrow matrices beside each linear layer, whose own weights stay (arXiv 2106.09685)."""

    method: Literal["lora"]
    init: Literal["default", "pissa"] = Field(
        "default",
        description="Where the narrow matrices start. `default`: their product is nothing. `pissa`: at the largest "
        "singular vectors of the weights (arXiv 2404.02948); the adapter is written with twice the rank, so that it "
        "goes with the weights as they were.",
    )

    @model_validator(mode="after")
    def _starts_in_one_way(self) -> Self:
        if self.init == "pissa" and self.dora:
            raise ValueError("init `pissa` changes the weights whose rows `dora` measures: take one of them")
        return self


class QLoRA(LowRank):
    """LoRA beside weights that are rounded while they are loaded, and stay so: a quarter or half of the memory
    (arXiv 2305.14314). Merged, what was learned is added to the weights as they came.
    """

    method: Literal["qlora"]
    base: Literal["nf4", "int8"] = Field(
        "nf4",
        description="What the weights are rounded to: 4 bits with a scale for 64 weights, or 8 bits with one for each "
        "output row, where inputs are rounded too (LLM.int8(), arXiv 2208.07339). Embeddings, norms and the output "
        "head keep 16 bits or more.",
    )
    double_quantization: bool = Field(True, description="Of nf4: keep the scales themselves in 8 bits.")
    init: Literal["default", "loftq"] = Field(
        "default",
        description="Where the narrow matrices start. `default`: their product is nothing. `loftq`: at the largest "
        "singular vectors of what nf4 loses (arXiv 2310.08659, one round); can't be merged.",
    )

    @model_validator(mode="after")
    def _makes_up_for_its_base(self) -> Self:
        if self.init == "loftq" and self.base != "nf4":
            raise ValueError("init `loftq` makes up for what nf4 loses: set base to nf4, or init to default")
        if self.init == "loftq" and self.dora:
            raise ValueError("init `loftq` changes the rows that `dora` measures: take one of them")
        if self.init == "loftq" and self.merge:
            raise ValueError(
                "init `loftq` makes up for what nf4 loses, and the weights that it would be merged into lost nothing: "
                "take init default, or leave `merge` out"
            )
        return self

    def base_settings(self, dtype: str) -> dict[str, Any]:
        """What transformers' BitsAndBytesConfig is told, so that the same base comes of it. dtype: of the computation,
        as torch calls it.
        """
        if self.base == "int8":
            return {"load_in_8bit": True}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quantization,
            "bnb_4bit_compute_dtype": dtype,
        }


class IA3(Adapters):
    """Learns a factor for every key, value and input of a feed-forward part's last layer (arXiv 2205.05638)."""

    method: Literal["ia3"]
    learning_rate: Rate = Field(3e-3, description=AT_ITS_HIGHEST)
    target_modules: Patterns = Field(
        (),
        max_length=64,
        description="Linear layers whose outputs get a factor each; shell patterns as of `lora`. The last layer of a "
        "feed-forward part gets them for its inputs. Left out: those that make keys and values, and these last layers.",
    )


class VirtualTokens(Adapters):
    """Learns tokens that no vocabulary has, which stand before every input. They take room of the context."""

    mergeable: ClassVar[bool] = False
    merge: bool = Field(False, description="Always false: virtual tokens stand before the input, not in the weights.")
    packing: bool = Field(
        False,
        description="Always false: of several examples in a sequence only the first would begin with virtual tokens.",
    )
    virtual_tokens: int = Field(20, ge=1, le=4096, description="Their number.")

    @model_validator(mode="after")
    def _stands_before_every_example(self) -> Self:
        if self.merge:
            raise ValueError(
                f"what {self.method} learns stands before the input and can't be merged into the weights: leave "
                "`merge` out, or take lora or ia3"
            )
        if self.packing:
            raise ValueError(
                f"{self.method} puts its tokens before each example, which has a sequence of its own: leave `packing` "
                "out"
            )
        return self


class Prompt(VirtualTokens):
    """Learns the embeddings of virtual tokens before the input: the fewest parameters (arXiv 2104.08691)."""

    method: Literal["prompt"]
    learning_rate: Rate = Field(3e-2, description=AT_ITS_HIGHEST)
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="What they start as: embeddings of tokens drawn from the vocabulary, or noise."
    )


class Prefix(VirtualTokens):
    """Learns keys and values of virtual tokens in the attention of every block (arXiv 2101.00190)."""

    method: Literal["prefix"]
    learning_rate: Rate = Field(1e-2, description=AT_ITS_HIGHEST)

    @model_validator(mode="after")
    def _keeps_its_keys(self) -> Self:
        if self.activation_checkpointing:
            raise ValueError(
                "the keys and values of a prefix are lost where activations are computed again: set "
                "activation_checkpointing to false, and micro_batch_size to less"
            )
        return self


class Full(Finetune):
    """Trains every weight of the model, in float32, with the state of an optimizer for each: 16 bytes a parameter."""

    method: Literal["full"]
    learning_rate: Rate = Field(2e-5, description=AT_ITS_HIGHEST)


class LastLayers(Finetune):
    """Trains the last decoder blocks with what follows them, and leaves the others as they are."""

    method: Literal["last_layers"]
    learning_rate: Rate = Field(5e-5, description=AT_ITS_HIGHEST)
    layers: int = Field(2, ge=1, le=1000, description="Decoder blocks that are trained, counted from the end.")


class Head(Finetune):
    """Trains a classification head, which reads the model's last token, from texts with labels. The model is written
    with it in place of its output head: what comes of it tells labels apart, and writes no more.
    """

    method: Literal["head"]
    learning_rate: float = Field(1e-3, gt=0, le=10, description="At its highest; with `layers`, 5e-5 is usual.")
    packing: bool = Field(
        False,
        description="Put several examples into one sequence, which don't see each other. A batch then holds as many as "
        "fit; without it, as many as it has sequences.",
    )
    layers: int = Field(
        0, ge=0, le=1000, description="Decoder blocks that are trained beside the head, counted from the end."
    )
    label_column: str = Field(
        "label",
        min_length=1,
        max_length=128,
        description="The column (or JSONL field) that holds the label: a string, a whole number or a bool.",
    )

    @property
    def whole(self) -> bool:
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


TRAINING_METHODS: tuple[type[Train], ...] = (LoRA, QLoRA, IA3, Prompt, Prefix, Full, LastLayers, Head)
