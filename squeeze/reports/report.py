"""`report.json`: what a job did to size, quality and speed. This module is its schema.

All sizes are bytes, all times seconds, all losses nats. A figure that was not measured is null, never zero.
"""

from typing import Any, Literal

from pydantic import Field

from squeeze.reports.experts import ExpertsLeft
from squeeze.reports.factoring import Ranks
from squeeze.reports.parts import Part, Quality, Text
from squeeze.reports.speed import SpeedTarget
from squeeze.reports.training import Training, Tuning
from squeeze.reports.vocabulary import Trimming
from squeeze.reports.zeros import BlockZeros


class Source(Part):
    model: str
    revision: str | None = Field(description="Commit that the id resolved to; null for a local directory.")
    architecture: str = Field(description="`model_type` of its config.")
    parameters: int
    bytes: int = Field(description="Of the weight files.")
    dtype: str
    license: str | None = None


class Cast(Part):
    """What a cast to a 16-bit type lost beyond the usual rounding, in numbers of weights."""

    saturated: int = Field(description="Beyond the largest number of the type; became that.")
    zeroed: int = Field(description="Too small for the type; became zero.")
    denormal: int = Field(description="So small that the type holds them with fewer bits than the others.")


class Layer(Part):
    """One compressed linear."""

    name: str
    element: str = Field("int", description="Of a code: `int`, `float8`, `float4`, `nf4`, or llama.cpp's block type.")
    bits: int
    group_size: int
    relative_error: float = Field(description="tr(ΔW H ΔWᵀ) / tr(W H Wᵀ); H = identity where no data was used.")
    damping: float | None = None
    damping_escalations: int = 0
    sparsity: float | None = Field(None, description="Share of its weights that are zero, where a step zeroes weights.")
    distribution: list[BlockZeros] | None = Field(
        None, description="Where each block has its own share of zeros (`distribution`)."
    )
    zeros_kept: float | None = Field(
        None, description="Share of the zeros that it came with that are still zero, where it came with many."
    )
    instead: str | None = Field(None, description="What compressed it where the method itself could not, and why.")
    cast: Cast | None = Field(None, description="Of a cast alone.")


class Trial(Part):
    """What rounding one layer to so many bits would cost, as predicted before anything was rounded for good."""

    bits: int
    divergence_nats: float = Field(description="½ tr(G ΔW H ΔWᵀ), G the second moment of the output's gradients.")


class Allotment(Part):
    """One layer's candidates, and what it got."""

    name: str
    weights: int
    trials: list[Trial]
    bits: int = Field(description="Chosen. Layers that engines compute as one get the same.")


class Optimum(Part):
    """The best that some budget allows."""

    bits: float = Field(description="Of a code, on average over the compressed weights.")
    divergence_nats: float = Field(description="Predicted: the sum over all layers.")


class Allocation(Part):
    """How a budget of bits was shared out among the layers (bits `auto`)."""

    measure: str = Field(description="How the cost of a candidate was predicted, and on what.")
    bits: float = Field(description="Of a code, on average over the compressed weights, as chosen.")
    divergence_nats: float = Field(description="Predicted for this choice; the measured one is in `quality`.")
    layers: list[Allotment]
    curve: list[Optimum] = Field(description="Of other budgets, from the least to the most bits.")


class Sparsity(Part):
    """What a step that zeroes weights did, counted on what was written, read back."""

    method: str
    pattern: str | None
    target: float = Field(description="Share of these layers' weights, and of each where `distribution` says no other.")
    layers: int
    weights: int = Field(description="Of these layers.")
    zeros: int = Field(description="Among them.")
    reached: float = Field(description="Zeros over weights of these layers.")
    of_model: float = Field(description="The same zeros over all parameters.")
    rows_checked: int | None = Field(
        description="Rows, all of which hold to the pattern, so that kernels that use it take them. Null without."
    )
    weight_bytes: int = Field(description="As written: what the zeros take is no less than what was there.")
    zstd_bytes: int = Field(description="Of the same weights under zstd, level 3: what storage or transfer could save.")
    zstd_bytes_before: int = Field(description="Of the source's weights under zstd.")
    quantized: bool = Field(False, description="By the same step; zeros are counted in the codes.")
    zstd_share_read: float = Field(description="Of either, what was compressed to know; 1: all of it.")
    zeros_kept: float | None = Field(
        None, description="Where a step that quantizes follows: share of the zeros that are zero in its result."
    )
    quality: Quality | None = Field(None, description="With zeros alone, where a step that quantizes follows.")


class Rotation(Part):
    """Rotations that were folded into the weights before they were compressed."""

    kind: str
    hidden_states: str = Field(description="The matrix that hidden states are multiplied by.")
    values: str = Field(description="The matrix that each head's values are multiplied by.")
    untied_bytes: int = Field(
        description="By how much the model grew, since its output head could not stay its embedding."
    )
    peak_before: float = Field(
        description="Of the weights of three blocks: mean over groups of 128 neighbours of (largest magnitude / root "
        "mean square)², which the rounding error on an even grid is proportional to."
    )
    peak_after: float


class Block(Part):
    index: int
    seconds: float
    peak_host_bytes: int
    peak_gpu_bytes: int
    relative_error: float | None = Field(
        description="‖after − before‖² / ‖before‖² of the block's outputs on the evaluation text."
    )
    layers: list[Layer]


class Size(Part):
    format: str
    bytes: int = Field(description="Of the whole directory.")
    weight_bytes: int
    ratio: float | None = Field(
        description="Weight bytes of the source over weight bytes of the result; null where that is no whole model."
    )


class Certificate(Part):
    """What a fresh process of a consumer said of one written directory."""

    format: str
    consumer: str
    version: str | None
    outcome: Literal["passed", "failed", "not checked"]
    detail: str
    perplexity: float | None = None
    expected_perplexity: float | None = None
    tolerance: float | None = Field(None, description="Allowed relative difference of the two.")
    sample: str | None = Field(None, description="What it generated.")
    seconds: float | None = None
    peak_host_bytes: int | None = Field(None, description="Largest resident size of the consumer's process.")


class MergedEntry(Part):
    """One of the models and adapters that were merged. Elements are counted over the tensors of the whole model."""

    model: str
    revision: str | None
    kind: Literal["model", "adapter"]
    weight: float = Field(description="By which its task vector was multiplied; normalized where that was asked for.")
    changed: int = Field(description="Elements that differ from the base's.")
    trimmed: int = Field(description="Of `changed`, those that were trimmed (ties) or dropped (dare).")
    conflicting: int = Field(
        description="Of the rest, those where another entry has the other sign: how far the entries pull apart."
    )
    used: int = Field(description="Of the rest, those that the result was made of: all, but for ties and magmax.")
    relative_length: float | None = Field(description="Of the task vector, over the length of the base's weights.")
    cosines: list[float | None] = Field(
        description="Between its task vector and that of each entry, in their order: near 0 they have nothing to do "
        "with each other, below 0 they undo each other. Null where one changed nothing."
    )


class Merging(Part):
    """What a step that merges did."""

    method: str
    scale: float
    elements: int = Field(description="Of a task vector: the floating-point numbers in the base's files.")
    models: list[MergedEntry] = Field(description="In the order of the request.")
    quality: Quality | None = Field(
        None,
        description="Of the merged model against the base, where a step that quantizes follows; where none does, it is "
        "the report's own `quality`.",
    )


class Speed(Part):
    """Of one model on the job's machine, in tokens a second; the weights are in memory, the blocks run one by one."""

    prompt_tokens: int = Field(description="Of the prompt that goes through at once.")
    prompt: float = Field(description="While it reads a prompt.")
    writing: float = Field(description="While it writes, one token at a time, without the attention to those before.")


class Slimming(Part):
    """What a step that makes a smaller model did."""

    method: str
    importance: str = Field(description="What was judged by it, and how.")
    calibration: Text
    blocks: list[float] | None = Field(
        None, description="Of `depth`: the importance of each decoder block of the original, in order."
    )
    removed: list[int] = Field(default_factory=list, description="Decoder blocks that are left out, counted from 0.")
    widths: dict[str, int] | None = Field(None, description="Of `width`: the sizes of the result, as in its config.")
    widths_before: dict[str, int] | None = Field(None, description="The same of the original.")
    trimming: Trimming | None = Field(None, description="Of `vocabulary`.")
    experts: ExpertsLeft | None = Field(None, description="Of `experts`.")
    parameters_before: int
    parameters_after: int
    bytes_before: int = Field(description="Of the weights.")
    bytes_after: int
    speed_before: Speed = Field(description="Measured with `speed_after`, the two in turn block by block.")
    speed_after: Speed
    speed_target: SpeedTarget | None = Field(None, description="Where one was asked for.")
    quality: Quality | None = Field(
        None,
        description="Of the smaller model against the original, where a step that quantizes follows; where none does, "
        "it is the report's own `quality`. A step that trains measures the smaller model itself, before it learns.",
    )


class Factoring(Ranks):
    """What a step that factors linears did."""

    speed_before: Speed = Field(description="Measured with the other two, the three in turn block by block.")
    speed_factored: Speed = Field(description="Multiplying by one factor after the other.")
    speed_merged: Speed = Field(description="Multiplied out, as a plain model: no quicker than before.")
    quality: Quality | None = Field(
        None,
        description="With factors alone, before what follows; else, where no step does, it is the report's `quality`.",
    )


class Spent(Part):
    seconds: dict[str, float] = Field(description="Wall time by stage.")
    work: dict[str, float] = Field(
        default_factory=dict,
        description="By stage, what was done in floating-point operations and what is counted as such (docs/plan.md); "
        "over `seconds`, the speed that plans of later jobs go by.",
    )
    cpu_seconds: float
    gpu_seconds: float
    peak_host_bytes: int = Field(
        description="Largest resident size of the job's process, or of all that share it together; the certifier's is "
        "apart."
    )
    peak_gpu_bytes: int
    certifier_peak_host_bytes: int | None = None


class Round(Part):
    """Of a job that prunes and trains in turn: what the steps before the last round did. A round ends where the next
    step is of a kind that was there already, or comes earlier in the order merging, making smaller, training, zeroing,
    quantizing.
    """

    steps: list[int] = Field(description="Their numbers in `recipe`, counted from 0.")
    parameters: int = Field(description="Of what it made; of factors, before they are multiplied out.")
    weight_bytes: int
    quality: Quality | None = Field(description="Of what it made against what it began with, where it was measured.")
    training: Training | None
    merging: Merging | None
    slimming: Slimming | None
    sparsity: Sparsity | None
    seconds: dict[str, float] = Field(description="Wall time by stage.")


class Report(Part):
    schema_version: Literal[1] = 1
    job: str | None = None
    squeeze: str = Field(description="Version of Squeeze.")
    libraries: dict[str, str]
    device: str
    source: Source
    recipe: list[dict[str, Any]] = Field(description="The steps as they ran, with every default written out.")
    seed: int
    calibration: Text | None
    quality: Quality | None
    training: Training | None = Field(None, description="Of a step that trains alone.")
    merging: Merging | None = Field(None, description="Of a step that merges alone.")
    slimming: Slimming | None = Field(None, description="Of a step that makes a smaller model alone.")
    tuning: Tuning | None = Field(None, description="Of `qat` alone.")
    bits_per_weight: float | None = Field(
        description="Null where no step quantizes. With `qlora` and base `gptq` this, `calibration`, `quality` and "
        "`blocks` are of the rounded base, without the adapter."
    )
    rotation: Rotation | None = Field(None, description="Of `rotation` alone.")
    allocation: Allocation | None = Field(None, description="Of bits `auto` alone.")
    sparsity: Sparsity | None = Field(None, description="Of a step that zeroes weights alone.")
    rounds: list[Round] = Field(
        default_factory=list,
        description="Of a job that prunes and trains in turn: all before the last, which the other fields tell of.",
    )
    factoring: Factoring | None = Field(None, description="Of a step that factors linears alone.")
    sizes: list[Size]
    blocks: list[Block]
    damping_escalations: int = Field(description="How often a factorisation failed and was tried with more damping.")
    certificates: list[Certificate]
    warnings: list[str]
    spent: Spent
