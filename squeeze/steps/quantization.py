"""The steps that quantize, one class per method. `models/quantize/<method>.py` does the work."""

from typing import Literal, Self

from pydantic import Field, model_validator

from squeeze.steps.compressing import Compress, Statistic
from squeeze.steps.schemes import Activations, Scheme
from squeeze.steps.sparsifying import AlsoZeroes
from squeeze.steps.training import Rounded

GroupSize = Literal[32, 64, 128, "channel"]
Mixture = Literal["q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]

CODE_BITS = (2, 3, 4, 8)  # of the integer codes of `Grouped`
USUAL_BITS = 4


class Quantize(Compress):
    """What every weight quantization shares."""

    kind: Literal["quantize"] = "quantize"
    method: str
    kv_cache: Literal["fp8"] | None = Field(
        None,
        description="`fp8`: keys and values are cached in 8 bits by engines that can (vLLM), with a scale a layer that "
        "this step finds on the calibration text. Left out: in 16 bits. Only compressed-tensors holds such scales.",
    )
    rotation: Literal["hadamard"] | None = Field(
        None,
        description="`hadamard`: orthogonal rotations are folded into the weights before anything is rounded, so that "
        "outliers are spread; the function stays the same and the result loads like any other. A tied output head is "
        "written apart from the embedding, so that the result grows. Left out: weights are rounded as they are.",
    )

    @property
    def scales_cache(self) -> bool:
        return self.kv_cache is not None

    @property
    def rotates(self) -> bool:
        return self.rotation is not None


class Grouped(Quantize):
    """What the methods share that round to integer codes with a scale for every group of input columns."""

    bits: Literal[2, 3, 4, 8, "auto"] = Field(
        4,
        description="Bits per weight code. `auto`: every layer gets as many as its share of the loss is worth, within "
        "`target_bits` or `target_bytes`.",
    )
    target_bits: float | None = Field(
        None,
        ge=2,
        le=8,
        description="With bits `auto`: bits of a weight code, on average over the weights of the compressed layers; "
        "scales come on top, as they do with a fixed number of bits.",
    )
    target_bytes: int | None = Field(
        None, ge=1, description="With bits `auto`: the most that all weight files of the result may take."
    )
    group_size: GroupSize = Field(
        128, description="Input columns that share one scale; `channel`: one scale for each output row."
    )
    symmetric: bool = Field(True, description="True: the zero point is the middle of the range; False: it is stored.")

    @model_validator(mode="after")
    def _has_a_target_where_it_allots(self) -> Self:
        targets = [name for name in ("target_bits", "target_bytes") if getattr(self, name) is not None]
        if self.bits == "auto" and len(targets) != 1:
            raise ValueError("bits `auto` takes one of target_bits and target_bytes")
        if self.bits != "auto" and targets:
            raise ValueError(f"{targets[0]} goes with bits `auto`")
        return self

    @property
    def needs_calibration(self) -> bool:
        return super().needs_calibration or self.bits == "auto"

    @property
    def average_bits(self) -> float:
        """Of a code, as far as the request tells: of a target in bytes it tells nothing."""
        return (self.target_bits or USUAL_BITS) if self.bits == "auto" else self.bits

    def scheme(self) -> Scheme:
        """With bits `auto`: of a layer that gets what the average says, rounded up."""
        bits = next(bits for bits in CODE_BITS if bits >= self.average_bits)
        return Scheme("int", bits, self.group_size, self.symmetric)


class RTN(Grouped):
    """Round to nearest: no data, the quickest, the least exact."""

    method: Literal["rtn"]


class GPTQ(AlsoZeroes, Grouped):
    """Rounds column by column and makes the columns still to come pay for the error (arXiv 2210.17323)."""

    method: Literal["gptq"]
    activation_order: bool = Field(
        True,
        description="Round the columns with the largest activations first. Groups stay where they are, so that the "
        "result loads wherever one without it does.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    asymmetric_calibration: bool = Field(
        False,
        description="Have every layer also make up for what the layers before it changed: its outputs on what it reads "
        "now are fitted to what they were in the uncompressed model (as GPTAQ, arXiv 2504.02692). Closer to the "
        "original; takes about twice as long and a second copy of the calibration activations. Experts of a mixture "
        "are left out.",
    )
    statistics = frozenset({"hessian"})

    def wanted(self) -> frozenset[Statistic]:
        return self.statistics | {"drift"} if self.asymmetric_calibration else self.statistics


class AWQ(Grouped):
    """Scales up the input columns that matter before rounding, where something before them can take the scale over,
    and clips each group's range where that costs least (arXiv 2306.00978).
    """

    method: Literal["awq"]
    grid: int = Field(20, ge=1, le=100, description="Strengths of the scaling that are tried, besides none at all.")
    statistics = frozenset({"hessian"})


class AutoRound(Grouped):
    """Learns which way each weight is rounded, and how far each group's grid reaches, by sign-gradient descent on the
    outputs of a whole block (SignRound, arXiv 2309.05516).
    """

    method: Literal["autoround"]
    iterations: int = Field(
        200, ge=0, le=5000, description="Steps of the descent in each block; 0: rounds to nearest on a searched grid."
    )
    by_block = True


class QAT(Grouped, Rounded):
    """Trains the whole model with its weights rounded, from the codes of another method on, to give what the original
    gives (quantization-aware training). Model and original are in memory whole, unlike with other methods.
    """

    method: Literal["qat"]

    def wanted(self) -> frozenset[Statistic]:
        return self.begun.wanted()

    @property
    def reads_inputs(self) -> bool:
        return self.begun.reads_inputs

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def begun(self) -> Grouped:
        """The step that makes what the training starts from."""
        shared = {name: getattr(self, name) for name in Grouped.model_fields if name != "method"}
        starts: dict[str, type[Grouped]] = {"gptq": GPTQ, "rtn": RTN, "autoround": AutoRound}
        return starts[self.start](method=self.start, **shared)


class HQQ(Grouped):
    """Rounds to nearest on a grid whose zero points a half-quadratic solver fits to the bulk of the weights (Badri and
    Shaji 2023). A symmetric grid has none to fit, and is that of `rtn`: set `symmetric` to false. No data.
    """

    method: Literal["hqq"]


class SmoothQuant(Quantize):
    """Eight-bit integers on both sides of the multiplication: weights with a scale a row, activations with one a token,
    their outliers first moved into the weights, where something before them can take the scale over (arXiv 2211.10438).
    """

    method: Literal["smoothquant"]
    alpha: float = Field(
        0.5, ge=0, le=1, description="How much of the outliers moves into the weights: 0 nothing, 1 all of it."
    )
    rounding: Literal["rtn", "gptq"] = Field("rtn", description="How the scaled weights are rounded.")
    statistics = frozenset({"moments"})

    def wanted(self) -> frozenset[Statistic]:
        return self.statistics | {"hessian"} if self.rounding == "gptq" else self.statistics

    def scheme(self) -> Scheme:
        return Scheme("int", 8, "channel", activations="int8")


class FP8(Quantize):
    """Eight-bit floating-point numbers (E4M3) on both sides of the multiplication, or for the weights alone."""

    method: Literal["fp8"]
    weight_scales: Literal["channel", "tensor"] = Field(
        "channel", description="What of the weights shares one scale: an output row, or a layer's whole weight."
    )
    activations: Literal["dynamic", "static", "none"] = Field(
        "dynamic",
        description="`dynamic`: a scale a token, found as it runs; no data is needed. `static`: one scale a layer, "
        "found on the calibration text. `none`: activations stay in 16 bits.",
    )

    def wanted(self) -> frozenset[Statistic]:
        return frozenset({"moments"}) if self.activations == "static" else frozenset()

    def scheme(self) -> Scheme:
        rounded: dict[str, Activations | None] = {"dynamic": "float8", "static": "float8-static", "none": None}
        return Scheme("float8", 8, self.weight_scales, activations=rounded[self.activations])


class MXFP4(Quantize):
    """Four-bit floating-point weights (E2M1) in blocks of 32 under a power of two; no data."""

    method: Literal["mxfp4"]

    def scheme(self) -> Scheme:
        return Scheme("float4", 4, 32)


class NVFP4(Quantize):
    """Four-bit floating-point weights (E2M1) in blocks of 16 under an eight-bit scale; no data."""

    method: Literal["nvfp4"]

    def scheme(self) -> Scheme:
        return Scheme("float4", 4, 16)


class NF4(Quantize):
    """Rounds to the quantiles of a normal distribution, in blocks of 64 with one scale (QLoRA, arXiv 2305.14314 §3).
    What bitsandbytes loads in 4 bits. No data.
    """

    method: Literal["nf4"]
    double_quantization: bool = Field(
        True, description="Store the scales themselves in 8 bits: 4.13 bits a weight instead of 4.5."
    )

    def scheme(self) -> Scheme:
        return Scheme("nf4", 4, 64, nested=self.double_quantization)


class Int8(Quantize):
    """Integers of 8 bits with one scale for each output row; whoever runs them rounds the activations too, but for
    columns that hold an outlier of 6 or more (LLM.int8(), arXiv 2208.07339). bitsandbytes' 8 bits. No data.
    """

    method: Literal["int8"]

    def scheme(self) -> Scheme:
        return Scheme("int", 8, "channel", activations="llm-int8")


class Cast(Quantize):
    """What the 16-bit casts share: every floating-point tensor of the model takes the type, not only linears."""

    @model_validator(mode="after")
    def _leaves_nothing_out(self) -> Self:
        if self.ignore:
            raise ValueError("a cast takes the whole model: leave `ignore` out")
        return self


class BF16(Cast):
    """A cast of the whole model to bfloat16. No data."""

    method: Literal["bf16"]

    def scheme(self) -> Scheme:
        return Scheme("bfloat16", 16, "channel")


class FP16(Cast):
    """A cast of the whole model to float16. Weights beyond ±65,504 become that, and are counted. No data."""

    method: Literal["fp16"]

    def scheme(self) -> Scheme:
        return Scheme("float16", 16, "channel")


# Of the most frequent block type: bits, inputs that share a scale, whether there is no offset.
MIXTURES: dict[Mixture, tuple[int, int, bool]] = {
    "q2_k": (2, 16, False),
    "q2_k_s": (2, 16, False),
    "q3_k_s": (3, 16, True),
    "q3_k_m": (3, 16, True),
    "q3_k_l": (3, 16, True),
    "q4_k_s": (4, 32, False),
    "q4_k_m": (4, 32, False),
    "q5_k_s": (5, 32, False),
    "q5_k_m": (5, 32, False),
    "q6_k": (6, 16, True),
}


class KQuant(Quantize):
    """llama.cpp's K-quants: blocks of 2 to 6 bits in its own mixtures, with GPTQ's error feedback on their grids."""

    method: Literal["kquant"]
    mixture: Mixture = Field(
        "q4_k_m",
        description="Which block types the layers get, by llama.cpp's names: the number is the bits of most layers, "
        "`s`, `m` and `l` how many layers that matter get more.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    statistics = frozenset({"hessian"})

    def scheme(self) -> Scheme:
        bits, group, symmetric = MIXTURES[self.mixture]
        return Scheme("ggml", bits, group, symmetric, ggml=f"q{bits}_k")


# That quantize.
METHODS: tuple[type[Quantize], ...] = (
    RTN,
    GPTQ,
    AWQ,
    AutoRound,
    QAT,
    HQQ,
    SmoothQuant,
    FP8,
    MXFP4,
    NVFP4,
    NF4,
    Int8,
    BF16,
    FP16,
    KQuant,
)
