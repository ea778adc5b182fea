"""The steps that finetune, one class per method: what it takes, with units, ranges and defaults.

As with the other steps, `kind` and `method` are the folder and the file in `models/`
(`finetune`, `lora` -> `models/finetune/lora.py`). A new method adds its class here and that file, nothing else.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from squeeze.steps.descent import AT_ITS_HIGHEST, Rate
from squeeze.steps.training import Train, Written


class Finetune(Train):
    """What every training on the user's own examples shares."""

    kind: Literal["finetune", "prune"] = "finetune"


class Adapters(Finetune):
    """Learns something beside the weights, which stay: small, and written apart from them.

    mergeable: whether what it learns can be added to the weights.
    """

    kind: Literal["finetune"] = "finetune"
    mergeable: ClassVar[bool] = True
    merge: bool = Field(
        False,
        description="Add what was learned to the weights: a plain model in 16 bits, written as `safetensors`, or what "
        "the next step goes on with.",
    )

    @property
    def keeps_zeros(self) -> bool:
        return False  # what an adapter adds to a weight stands everywhere

    @property
    def whole(self) -> bool:
        return self.merge

    @property
    def formats(self) -> tuple[Written, ...]:
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
    """LoRA beside weights that are rounded while they are loaded, or before by GPTQ, and stay so: a quarter or half of
    the memory (arXiv 2305.14314). Merged, what was learned is added to the weights as they came.
    """

    method: Literal["qlora"]
    base: Literal["nf4", "int8", "gptq"] = Field(
        "nf4",
        description="What the weights are rounded to: 4 bits with a scale for 64 weights, or 8 bits with one for each "
        "output row, where inputs are rounded too (LLM.int8(), arXiv 2208.07339). `gptq`: 4 bits that this job finds "
        "on the training examples before it trains (arXiv 2210.17323), and writes as `gptq`, so that the adapter can "
        "be served beside the very weights that it was trained on. Embeddings, norms and the output head keep 16 bits "
        "or more.",
    )
    double_quantization: bool = Field(True, description="Of nf4: keep the scales themselves in 8 bits.")
    group_size: Literal[32, 64, 128, "channel"] | None = Field(
        None,
        description="Of gptq: input columns that share one scale; `channel`: one scale for each output row. Left out: "
        "the largest of 128, 64 and 32 that divides the inputs of every layer, or else `channel`.",
    )
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

    @model_validator(mode="after")
    def _says_nothing_of_another_base(self) -> Self:
        if self.base != "gptq" and self.group_size is not None:
            raise ValueError(f"group_size is of gptq, and {self.base} has groups of its own: set base to gptq")
        if self.base == "gptq" and not self.double_quantization:
            raise ValueError("double_quantization is of nf4; the scales of gptq have 16 bits: leave it out")
        if self.base == "gptq" and self.dora:
            raise ValueError("peft loads no `dora` beside weights of gptq: leave `dora` out, or take base nf4 or int8")
        return self

    @property
    def formats(self) -> tuple[Written, ...]:
        if self.base != "gptq":
            return super().formats
        return ("peft", "gptq", "safetensors") if self.merge else ("peft", "gptq")

    def base_settings(self, dtype: str) -> dict[str, Any] | None:
        """What transformers' BitsAndBytesConfig is told, so that the same base comes of it; None where its codes are
        files of their own. dtype: of the computation, as torch calls it.
        """
        if self.base == "gptq":
            return None
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

    kind: Literal["finetune"] = "finetune"
    method: Literal["full"]
    learning_rate: Rate = Field(2e-5, description=AT_ITS_HIGHEST)

    @property
    def keeps_factors(self) -> bool:
        return True


class LastLayers(Finetune):
    """Trains the last decoder blocks with what follows them, and leaves the others as they are."""

    kind: Literal["finetune"] = "finetune"
    method: Literal["last_layers"]
    learning_rate: Rate = Field(5e-5, description=AT_ITS_HIGHEST)
    layers: int = Field(2, ge=1, le=1000, description="Decoder blocks that are trained, counted from the end.")


class Head(Finetune):
    """Trains a classification head, which reads the model's last token, from texts with labels. The model is written
    with it in place of its output head: what comes of it tells labels apart, and writes no more.
    """

    kind: Literal["finetune"] = "finetune"
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
    domainless: ClassVar[str | None] = "domains are weighed by what a model lost of its text, and head learns labels"

    @property
    def whole(self) -> bool:
        return False


TRAINING_METHODS: tuple[type[Train], ...] = (LoRA, QLoRA, IA3, Prompt, Prefix, Full, LastLayers, Head)
