"""How much host memory a training will take, from the model's shape and the spec alone; docs/plan.md has the terms.

The whole model is in memory, with what learns, its gradients and the optimizer's state; beside them, for a micro-batch,
what the backward pass needs of the forward one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from squeeze.costs.memory import KERNEL_BYTES, PROCESS_BYTES, needed
from squeeze.costs.trainable import Learned
from squeeze.names import Format
from squeeze.shapes.model import Block, Group, Shape
from squeeze.specs.bases import base_of
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import Head, LowRank, QLoRA
from squeeze.steps.movement import Movement
from squeeze.steps.training import Train

FLOAT = 4
# Of processes that have imported what they need, the job's and the certifier's; measured, on a CPU.
PEFT_BYTES, CERTIFIER_PEFT_BYTES = 625_000_000, 565_000_000
CERTIFIER_LOGIT_BYTES, CERTIFIER_LOGIT_SLICES = 256 << 20, 2.5  # of one float32 slice of logits
TEXT_SHARE = 3.0  # bytes that a byte of the examples takes: its token's id, whether it is learned, its record's hash
# glibc keeps pieces up to this size in one heap, where freed ones leave holes that aligned ones don't fit into (until
# 2.38). What lies there takes this many times its size; measured. Adapters free more beside each that is kept, unless
# what they add is computed as one (`models.finetune.fused`). With checkpointed activations and rounded weights nothing
# lies there (`models.resources.map_large_memory`).
HEAP_BYTES = 32 << 20
HOLES, HOLES_WITH_ADAPTERS = 1.6, 2.0
LOGIT_COPIES = 3  # float32: log-probabilities, and two gradients
SCORED_COPIES = 2  # logits and log-probabilities, where nothing is learned


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. process: with its libraries, and the examples. weights: of the model, as it computes. learning: gradients,
    the optimizer's state, and the parameters where they stand apart. activations: what a micro-batch leaves for the
    backward pass. passing: what is held for a moment at its beginning: logits and the first gradients, or while the
    held-out loss is measured. certifier: its process. rounding: block by block, of a base that is made
    beforehand.
    """

    process: int
    weights: int
    learning: int
    activations: int
    passing: int
    certifier: int
    rounding: int = 0

    @property
    def job(self) -> int:
        """Of the job's own process at its peak."""
        return self.process + max(self.rounding, self.weights + self.learning + self.activations + self.passing)

    @property
    def whole(self) -> int:
        """Of all processes of the job at one moment: the certifier runs beside the job's, which then holds nothing."""
        return max(self.job, self.process + self.certifier)


def needed_to_train(
    shape: Shape, spec: JobSpec, step: Train, learned: Learned, formats: Mapping[Format, int], text_bytes: int = 0
) -> TrainingMemory:
    """The memory of a step that trains. formats: of its results, with the bytes of their weight files; none: no
    certifier is counted. text_bytes: of the examples, where that is known.
    """
    each = 2 if step.precision in ("bf16", "fp16") else FLOAT
    length = min(spec.data.length, shape.positions or spec.data.length)
    tokens = step.together * length
    plain = (shape.elements - learned.rounded - learned.left_out) * each + learned.rounded_bytes
    weights = plain if learned.apart else plain + learned.parameters * (FLOAT - each)
    passing = Pass(shape, step, learned, each, tokens, length)
    through = sorted(map(passing.kept, shape.blocks), reverse=True)[: learned.blocks]
    activations = sum(through)
    if step.activation_checkpointing and through:
        activations = learned.blocks * passing.held(tokens, shape.hidden, each) + through[0]
    elif each < FLOAT and not learned.apart:  # weights that learn are float32, and compute as copies of 16 bits
        activations += learned.parameters * each
    scored = min(tokens, spec.evaluation.samples * length)
    process, certifying = (PEFT_BYTES, CERTIFIER_PEFT_BYTES) if learned.apart else (PROCESS_BYTES, PROCESS_BYTES)
    slices = 0 if isinstance(step, Head) else CERTIFIER_LOGIT_SLICES  # a few logits, of labels
    certifier = certifying + plain + int(slices * slice_of(shape, length))
    beforehand, rounding_bytes = base_of(shape, spec, step), 0
    if beforehand is not None:
        certifier += learned.rounded_bytes + int(KERNEL_BYTES * learned.rounded)  # from files to what kernels take
        rounding_bytes = needed(shape, beforehand).job - PROCESS_BYTES
    return TrainingMemory(
        process=process + int(TEXT_SHARE * text_bytes),
        weights=weights,
        learning=learned.bytes + _copies(step, learned) + _set_aside(step, learned),
        activations=activations,
        passing=max(
            passing.logits(tokens, LOGIT_COPIES),
            passing.logits(scored, SCORED_COPIES) - activations,
            passing.gradients(),
        ),
        certifier=certifier if formats else 0,
        rounding=rounding_bytes,
    )


@dataclass(frozen=True)
class Pass:
    """One micro-batch on its way. each: bytes of a number as the model computes. tokens: of all its sequences."""

    shape: Shape
    step: Train
    learned: Learned
    each: int
    tokens: int
    length: int

    def kept(self, block: Block) -> int:
        """What a block leaves for the backward pass: inputs of what learns, what attention read and made, what stands
        around activation functions and norms, and its own copy of the mask that keeps packed examples apart. Scores of
        attention are computed again, piece by piece (torch's scaled_dot_product_attention).
        """
        each, tokens, hidden = self.each, self.tokens, self.shape.hidden
        total = 2 * self.held(tokens, hidden, FLOAT)  # what both norms read, which compute in float32
        if each < FLOAT:
            total += 2 * self.held(tokens, hidden, each)
        for group in block.groups:
            some = int(group.share * tokens)
            if self.learned.linears:
                total += self.held(some, group.columns, each)
            if isinstance(self.step, LowRank) and self.step.dropout:  # what is left of them, and which are left
                total += len(group.rows) * self.held(some, group.columns, each + 1)
            total += sum(self.held(some, width, each) for width in _made(group, hidden))
            total += len(group.rows) * self.held(some, self.learned.rank, each)
            if self.learned.factored:  # what a first factor makes, of the highest rank at which both are fewer
                ranks = (rows * group.columns // (rows + group.columns) for rows in group.rows)
                total += sum(self.held(some, rank, each) for rank in ranks)
        return total + (self.held(tokens, self.length, each) if self.step.packing else 0)

    def logits(self, tokens: int, copies: int) -> int:
        if isinstance(self.step, Head):  # of labels, and of one token of each example
            return 0
        own = self.held(tokens, self.shape.vocabulary, self.each) if self.each < FLOAT else 0
        return own + copies * self.held(tokens, self.shape.vocabulary, FLOAT)

    def gradients(self) -> int:
        """Inside of a block."""
        widest = max((max(group.rows) for block in self.shape.blocks for group in block.groups), default=0)
        restored = max((rows * columns for rows, columns in self.learned.linears), default=0) * bool(
            self.learned.rounded
        )
        return 4 * self.held(self.tokens, widest, self.each) + 2 * restored * self.each

    def held(self, tokens: int, width: int, each: int) -> int:
        size = tokens * width * each
        if size >= HEAP_BYTES or self.step.activation_checkpointing or isinstance(self.step, QLoRA):
            return size
        return int((HOLES_WITH_ADAPTERS if self.learned.apart and not self.fused else HOLES) * size)

    @property
    def fused(self) -> bool:
        """Whether a layer and what LoRA adds to it are one operation."""
        step = self.step
        return isinstance(step, LowRank) and self.each == FLOAT and not (step.dora or step.dropout)


def slice_of(shape: Shape, length: int, most_bytes: int = CERTIFIER_LOGIT_BYTES) -> int:
    """Of float32 logits of so many positions of a sequence as fit in it."""
    return max(16, min(length, most_bytes // (FLOAT * max(shape.vocabulary, 1)))) * shape.vocabulary * FLOAT


def _copies(step: Train, learned: Learned) -> int:
    """Of what learns: as it began, where it stands apart, at its best, where that is looked for, and its average."""
    as_often = (step.evaluate_every is not None) + (step.ema is not None)
    return FLOAT * (learned.parameters * (learned.apart + as_often) + learned.scores * as_often)


def _set_aside(step: Train, learned: Learned) -> int:
    """While weights are zero in the forward pass: which, a byte for each, and what they were."""
    return int(learned.scores * (1 + FLOAT * step.sparsity)) if isinstance(step, Movement) else 0


def _made(group: Group, hidden: int) -> tuple[int, ...]:
    """Widths of what a group's outputs leave."""
    if group.rows == (hidden,):  # added to what runs past the blocks, which the next norm reads
        return ()
    if len(group.rows) >= 3:  # queries, keys and values, these repeated for every head
        return (max(group.rows),) * 3
    return (*group.rows, max(group.rows)) if len(group.rows) == 2 else group.rows  # a gate is activated
