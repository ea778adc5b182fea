"""The parts of `report.json` that tell of training."""

from typing import Literal

from pydantic import Field

from squeeze.reports.parts import Part
from squeeze.specs.choosing import Choice
from squeeze.steps.sharding import Way


class TrainingData(Part):
    """What was learned from, and what the loss was measured on. sha256: of token ids (int32 little-endian), of what is
    learned (a byte a token), of where each example begins and, where domains are weighed, of the number of each
    example's (int64 little-endian), one behind the other.
    """

    origin: str
    held_out_origin: str = Field(description="The same, where a part of it was held out by its records' hashes.")
    records: int
    held_out_records: int
    examples: int = Field(description="Records, longer texts cut into several.")
    held_out_examples: int
    tokens: int
    learned_tokens: int = Field(description="Of `tokens`, those whose loss counts.")
    sha256: str
    held_out_sha256: str
    labels: dict[str, int] | None = Field(
        None, description="Records to learn from by label, in the order of the labels' numbers; of `head` alone."
    )
    held_out_labels: dict[str, int] | None = Field(None, description="Held-out records by label, in the same order.")
    domains: dict[str, int] | None = Field(
        None, description="Records to learn from by domain, where `domain_column` names these."
    )
    held_out_domains: dict[str, int] | None = Field(None, description="Held-out records by domain.")


class TrainingStep(Part):
    """One step of the optimizer."""

    step: int = Field(description="The first is 1.")
    loss: float = Field(description="What falls, mean over the learned tokens of the batch, before the step.")
    learning_rate: float
    gradient_norm: float = Field(description="Before it was clipped.")
    tokens: int = Field(description="That went through the model, those that are not learned counted in.")
    seconds: float
    peak_host_bytes: int = Field(description="Largest resident size of the process so far.")
    peak_gpu_bytes: int


class HeldOutLoss(Part):
    """A look at the held-out loss."""

    step: int = Field(description="After so many steps.")
    loss: float = Field(description="Mean over the learned tokens of the held-out examples.")
    sparsity: float | None = Field(
        None, description="Share of the layers' weights that were zero then, where they are zeroed as it learns."
    )
    domain_losses: dict[str, float] | None = Field(None, description="The same by domain, where domains are weighed.")
    domain_weights: dict[str, float] | None = Field(
        None, description="Shares of the sequences that are learned from, by domain, from here to the next look."
    )


class Domain(Part):
    """A domain of what was learned from, where these were weighed by what was lost in them."""

    name: str
    tokens: int = Field(description="To learn from.")
    sequences: int = Field(description="To learn from, packed where they are.")
    drawn: int = Field(description="Sequences that were learned from, as often as they were.")
    measured_tokens: int = Field(description="Held-out learned tokens that its loss was measured on.")
    weight_before: float = Field(description="Its share of the sequences, at which it began.")
    weight_after: float = Field(description="Share of the sequences that were drawn last; `held_out` has all others.")
    loss_reference: float = Field(
        description="Held-out, of the model before anything was taken from it; of a distillation, of the teacher."
    )
    loss_before: float = Field(description="Held-out, of the model as the training found it.")
    loss_after: float = Field(description="Held-out, of what was kept.")


class Distillation(Part):
    """Of a step that distills: who learned from the job's model, and how far from it the student is.

    Losses and divergences are means over the held-out learned tokens; the divergence is KL(teacher ‖ student) of whole
    distributions at temperature 1.
    """

    student: str = Field(description="A model, or the teacher's blocks that it began with.")
    student_parameters: int
    student_bytes: int = Field(description="Of its weights, as it began.")
    teacher_parameters: int
    vocabulary: int | None = Field(
        description="Tokens that both know; what fills a table up is left out. Null, as all comparisons are, where "
        "they are of different tokenizers."
    )
    stored_bytes_per_token: int | None = Field(
        description="Kept of what the teacher says of a learned token; null where it was asked anew each time."
    )
    stored_bytes: int | None
    loss_teacher: float | None
    divergence_before: float | None
    divergence_after: float | None
    agreement_before: float | None = Field(description="Share of the tokens where both find the same one likeliest.")
    agreement_after: float | None


class Training(Part):
    """What a step that trains did."""

    method: str
    precision: Literal["fp32", "bf16", "fp16"]
    trainable_parameters: int
    trained_modules: int = Field(description="Linear layers that were trained or have an adapter.")
    data: TrainingData
    sequence_length: int
    packed: bool = Field(description="Several examples to a sequence, which don't see each other.")
    sequences: int = Field(description="To train on, packed where they are.")
    filled: float = Field(description="Share of the positions that go through the model that hold tokens.")
    measured_examples: int = Field(description="Held-out examples that the loss was measured on.")
    measured_tokens: int = Field(description="Learned tokens of these.")
    steps: int = Field(description="That were taken.")
    planned_steps: int
    stopped: str | None = Field(None, description="Why it ended before the planned steps.")
    best_step: int = Field(description="After which the weights are that were kept.")
    loss_before: float = Field(
        description="Held-out, of the model as it came (with qlora, as it was rounded); of a distillation, of the "
        "student."
    )
    loss_after: float = Field(description="Held-out, of what was kept.")
    loss_written: float | None = Field(None, description="Held-out, of the whole model as it is stored, if one is.")
    loss_quantized: dict[str, float] = Field(
        default_factory=dict,
        description="Held-out, by format, where the next step quantized what was merged; as transformers sees it.",
    )
    zeros_kept: int | None = Field(
        None,
        description="Of a model that was pruned before: weights of its linear layers that were zero, all of which are "
        "zero in what was written.",
    )
    accuracy_before: float | None = Field(
        None, description="Share of the measured examples whose label was told, by a head drawn at random; of `head`."
    )
    accuracy_after: float | None = Field(None, description="The same, by what was kept.")
    majority_share: float | None = Field(
        None, description="Of the commonest label among the measured examples: what always saying that would reach."
    )
    curve: list[TrainingStep]
    held_out: list[HeldOutLoss]
    tokens_per_second: float = Field(description="Through the model and back, while it trained.")
    resumed: list[int] = Field(default_factory=list, description="Steps after which another attempt went on.")
    distillation: Distillation | None = Field(None, description="Of a step that distills alone.")
    processes: int = Field(1, description="That shared the batches.")
    sharding: Way | None = Field(None, description="Where they were several: what each of them held of the model.")
    domains: list[Domain] = Field(
        default_factory=list, description="Where `domain_column` names these; the loss counts as many tokens of each."
    )
    chosen: list[Choice] = Field(default_factory=list, description="What each `auto` of the request came to, and why.")


class Tuning(Part):
    """What training the rounded weights did (method `qat`)."""

    trained: Literal["scales", "weights"]
    precision: Literal["fp32", "bf16"]
    trainable_parameters: int
    sequences: int = Field(description="Of the calibration text, which it learns from.")
    steps: int
    perplexity_start: float | None = Field(description="Of the codes that it started from, on the evaluation text.")
    divergence_start: float | None = Field(description="Of the same, nats a token from the original.")
    curve: list[TrainingStep] = Field(
        description="`loss` is the divergence from the original, or without it the negative log-likelihood."
    )
    tokens_per_second: float = Field(description="Through the model and back, while it trained.")
    resumed: list[int] = Field(default_factory=list, description="Steps after which another attempt went on.")
