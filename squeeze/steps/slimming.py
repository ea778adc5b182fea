"""The steps that make a smaller model of the same family, which loads wherever the original does.

As with the other steps, `kind` and `method` are the folder and the file in `models/` (`prune`, `depth` ->
`models/prune/depth.py`). What a result has of each tensor is in `squeeze.shapes.slimmed`.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from squeeze.wire import Wire

MULTIPLE = 32  # the smallest usual group of columns that shares a scale
Part = Literal["writing", "prompt"]
SIZES = ("intermediate_size", "heads", "hidden_size")


class Slim(Wire):
    """What the methods share that make a plain, smaller model: what matters least on the job's text is left out."""

    kind: Literal["prune"] = "prune"
    method: str
    params_target: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of all parameters, embeddings among them, that the result may have; it has the most that "
        "fit in, and the plan says how many.",
    )
    by_block: ClassVar[bool] = False
    equivalent: ClassVar[bool] = False  # whether what it makes says just what the original says
    judges: ClassVar[bool] = True  # goes through the model block by block to find what matters

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at text."""
        return True

    @property
    def exact(self) -> bool:
        """Whether its settings say how small the result is, to the parameter."""
        return True

    @property
    def formats(self) -> tuple[Literal["safetensors"], ...]:
        """What a job is written as that ends with this step."""
        return ("safetensors",)


class Paced(Slim):
    """What the methods share whose result is quicker for every token."""

    speed_target: float | None = Field(
        None,
        gt=1,
        le=1000,
        description="Times as many tokens a second as the original's that the result has at least, measured on the "
        "machine that runs the job with one sequence at a time: parts of both models are timed in turn, and the result "
        "is the largest that is quick enough. It is measured again when it is written; the report has both figures, "
        "which differ by some 10 % where it does other things too. The plan only estimates, by multiply-adds.",
    )
    speed_of: Part = Field(
        "writing",
        description="What `speed_target` is of: `writing` one token at a time, or reading a `prompt` of 128 tokens.",
    )


class Depth(Paced):
    """Leaves out the decoder blocks that change least of what comes to them (ShortGPT, arXiv 2403.03853), or that the
    text misses least (Shortened LLaMA, arXiv 2402.02834): fewer parameters, a smaller key/value cache, and less time
    for every token, in proportion.
    """

    method: Literal["depth"]
    blocks: int | None = Field(None, ge=1, le=1000, description="Decoder blocks that stay.")
    importance: Literal["influence", "perplexity"] = Field(
        "influence",
        description="What a block is judged by. `influence`: one less the cosine of what it is given and what it hands "
        "on, on average over the tokens of the calibration text, which goes through the model once. `perplexity`: that "
        "of the first 32,768 tokens of the calibration text when the block is left out. They go through the model half "
        "as often as it has blocks, and their hidden states are kept as often as it has blocks, in memory or on disk.",
    )
    iterative: bool = Field(
        False,
        description="With the importance `perplexity`: blocks go one at a time, and after each the others are judged "
        "anew without it (SLEB, arXiv 2402.09025). Takes as many times as long as blocks go.",
    )

    @model_validator(mode="after")
    def _judges_anew_by_perplexity(self) -> Self:
        if self.iterative and self.importance != "perplexity":
            raise ValueError("blocks are judged anew after each that goes by their perplexity: set `importance` to it")
        return self

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        if sum(one is not None for one in (self.blocks, self.params_target, self.speed_target)) != 1:
            raise ValueError(
                "say how small: either `blocks`, as many as stay, or `params_target`, a share, or `speed_target`"
            )
        return self


class Width(Paced):
    """Leaves out the neurons, attention heads and channels of the hidden state that put out least on the job's text
    (Minitron, arXiv 2407.14679), or that its loss depends on least (LLM-Pruner, arXiv 2305.11627). Neurons and heads
    are chosen block by block, channels for the whole model.

    With `params_target` or `speed_target`, neurons of the feed-forward parts go first, down to half of them, then
    heads, in whole groups that share keys and values, down to half, then channels, down to half; sizes stay multiples
    of 128, 64 or 32, as far as the original's are, so that they can be rounded in groups. A Qwen2 has as many channels
    as its heads have together, or llama.cpp does not load it: there they go together.
    """

    method: Literal["width"]
    importance: Literal["activation", "gradient"] = Field(
        "activation",
        description="What neurons, heads and channels are judged by. `activation`: what they put out. `gradient`: what "
        "the loss of the calibration text would change by without them, to first order (LLM-Pruner, arXiv 2305.11627, "
        "element-wise), told from its first 32,768 tokens, which go through the model twice and back once.",
    )
    intermediate_size: int | None = Field(
        None, ge=MULTIPLE, le=1 << 20, description="Neurons of each feed-forward part that stay; a multiple of 32."
    )
    heads: int | None = Field(
        None, ge=1, le=1 << 14, description="Attention heads that stay: whole groups that share keys and values."
    )
    hidden_size: int | None = Field(
        None, ge=MULTIPLE, le=1 << 20, description="Channels of the hidden state that stay; a multiple of 32."
    )

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        said = [name for name in SIZES if getattr(self, name) is not None]
        if bool(said) + (self.params_target is not None) + (self.speed_target is not None) != 1:
            raise ValueError(
                "say how small: either `params_target`, a share, or `speed_target`, or sizes: `intermediate_size`, "
                "`heads`, `hidden_size`"
            )
        for name in ("intermediate_size", "hidden_size"):
            size = getattr(self, name)
            if size is not None and size % MULTIPLE:
                below = size // MULTIPLE * MULTIPLE
                raise ValueError(f"{name} is a multiple of {MULTIPLE}: {below} or {below + MULTIPLE}, not {size}")
        return self


class Vocabulary(Slim):
    """Leaves out the tokens that the job's text does not need, from the embedding, the output head and the tokenizer
    together. Every text of `data` gets the same tokens as before, under new numbers, and the model says the same of
    them; any other text can still be told, in more tokens.

    Needed are the tokens of every text of `data`, all of it read, those that they are merged from, all bytes, special
    and added tokens, and what the chat template writes. Where neither `size` nor `params_target` is said, that is what
    stays, filled up to the next multiple with what was the most frequent when the tokenizer was made.
    """

    method: Literal["vocabulary"]
    judges: ClassVar[bool] = False
    equivalent: ClassVar[bool] = True
    size: int | None = Field(
        None,
        ge=64,
        le=1 << 24,
        description="Tokens that stay, a multiple of `multiple`: those that the text needs, filled up with those that "
        "were the most frequent when the tokenizer was made.",
    )
    keep: tuple[Annotated[str, Field(min_length=1, max_length=10000)], ...] = Field(
        (), max_length=1024, description="Texts whose tokens stay too, or tokens as the vocabulary has them."
    )
    multiple: int = Field(
        64, ge=1, le=4096, description="What the number of tokens is a multiple of, for the products that read them."
    )

    @property
    def exact(self) -> bool:
        return self.size is not None or self.params_target is not None

    @model_validator(mode="after")
    def _says_one_size(self) -> Self:
        if self.size is not None and self.params_target is not None:
            raise ValueError(
                "say how small once: either `size`, so many tokens, or `params_target`, a share, or neither"
            )
        if self.size is not None and self.size % self.multiple:
            below = self.size // self.multiple * self.multiple
            near = f"{below} or {below + self.multiple}" if below >= 64 else f"{below + self.multiple}"
            raise ValueError(f"size is a multiple of {self.multiple}: {near}, not {self.size}")
        return self


class Experts(Slim):
    """Leaves out the experts of a mixture that add least to what their tokens become, as many of each layer (REAP,
    arXiv 2510.13999): fewer bytes, the same work for every token. Nothing is merged; shared experts stay.
    """

    method: Literal["experts"]
    experts: int | None = Field(
        None,
        ge=1,
        le=1 << 14,
        description="Experts of each layer that stay; where routers choose among groups of them first, as many of each "
        "group. A token goes to no more than are left.",
    )

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        if (self.experts is None) == (self.params_target is None):
            raise ValueError("say how small: either `experts`, as many as stay of a layer, or `params_target`, a share")
        return self


SLIMMING_METHODS: tuple[type[Slim], ...] = (Depth, Width, Experts, Vocabulary)
