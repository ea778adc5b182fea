"""How much host memory a training will take, from the model's shape and the spec alone; docs/plan.md has the terms.

The whole model is in memory, with what learns, its gradients and the optimizer's state; beside them, for a micro-batch,
what the backward pass needs of the forward one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from squeeze.shapes import Block, Group, Shape
from squeeze.specs import JobSpec
from squeeze.steps import Format
from squeeze.trainable import Learned
from squeeze.training import Finetune, LowRank

FLOAT = 4
PROCESS_BYTES = 625_000_000  # of a process that has imported what a training needs; measured, on a CPU
CERTIFIER_BYTES = 565_000_000  # of a certifier's, with peft
CERTIFIER_LOGIT_BYTES, CERTIFIER_LOGIT_SLICES = 256 << 20, 2.5  # of one float32 slice of logits
TEXT_SHARE = 3.0  # bytes that a byte of the examples takes: its token's id, whether it is learned, its record's hash
# glibc keeps pieces up to this size in one heap, where aligned ones leave holes that no other fits into (until 2.38).
HEAP_BYTES = 32 << 20
HOLES = 2.0  # by which what lies in the heap takes more than its size; measured
LOGIT_COPIES = 3  # float32: log-probabilities, and two gradients
SCORED_COPIES = 2  # logits and log-probabilities, where nothing is learned


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. process: with its libraries, and the examples. weights: of the model, as it computes. learning: gradients,
    the optimizer's state, and the parameters where they stand apart. activations: what a micro-batch leaves for the
    backward pass. passing: what is held for a moment at its beginning: logits and the first gradients, or while the
    held-out loss is measured. certifier: its process.
    """

    process: int
    weights: int
    learning: int
    activations: int
    passing: int
    certifier: int

    @property
    def job(self) -> int:
        """Of the job's own process at its peak."""
        return self.process + self.weights + self.learning + self.activations + self.passing

    @property
    def whole(self) -> int:
        """Of all processes of the job at one moment: the certifier runs beside the job's, which then holds nothing."""
        return max(self.job, self.process + self.certifier)


def needed_to_train(
    shape: Shape, spec: JobSpec, step: Finetune, learned: Learned, formats: Mapping[Format, int], text_bytes: int = 0
) -> TrainingMemory:
    """The memory of a step that trains. formats: of its results, with the bytes of their weight files; none: no
    certifier is counted. text_bytes: of the examples, where that is known.
    """
    each = 2 if step.precision in ("bf16", "fp16") else FLOAT
    length = min(spec.data.sequence_length, shape.positions or spec.data.sequence_length)
    tokens = (step.micro_batch_size or step.batch_size) * length
    if learned.apart:
        weights = (shape.elements - learned.rounded) * each + learned.rounded_bytes
    else:
        weights = (shape.elements - learned.parameters) * each + learned.parameters * FLOAT
    kept = sorted((_kept(block, shape, step, learned, each, tokens, length) for block in shape.blocks), reverse=True)
    through = kept[: learned.blocks]
    activations = sum(through)
    if step.activation_checkpointing and through:
        activations = learned.blocks * _held(tokens, shape.hidden, each) + through[0]
    scored = min(tokens, spec.evaluation.samples * length)
    passing = max(
        _logits(shape, tokens, LOGIT_COPIES, each),
        _logits(shape, scored, SCORED_COPIES, each) - activations,
        _widest(shape, tokens, each),
    )
    certifier = CERTIFIER_BYTES + shape.elements * each + int(CERTIFIER_LOGIT_SLICES * _slice(shape, length))
    return TrainingMemory(
        process=PROCESS_BYTES + int(TEXT_SHARE * text_bytes),
        weights=weights,
        learning=learned.bytes + _copies(step, learned),
        activations=activations,
        passing=passing,
        certifier=certifier if formats else 0,
    )


def _copies(step: Finetune, learned: Learned) -> int:
    """Of what learns: as it began, where it stands apart, at its best, where that is looked for, and its average."""
    return FLOAT * learned.parameters * (learned.apart + (step.evaluate_every is not None) + (step.ema is not None))


def _kept(block: Block, shape: Shape, step: Finetune, learned: Learned, each: int, tokens: int, length: int) -> int:
    """What a block leaves for the backward pass: inputs of what learns, what attention read and made, what stands
    around activation functions and norms, and its own copy of the mask that keeps packed examples apart. Scores of
    attention are computed again, piece by piece (torch's scaled_dot_product_attention).
    """
    total = 2 * _held(tokens, shape.hidden, FLOAT)  # what both norms read, which compute in float32
    if each < FLOAT:
        total += 2 * _held(tokens, shape.hidden, each)
    for group in block.groups:
        if learned.linears:
            total += _held(int(group.share * tokens), group.columns, each)
        for width in _made(group, shape.hidden):
            total += _held(int(group.share * tokens), width, each)
        if learned.rank:
            total += len(group.rows) * _held(int(group.share * tokens), learned.rank, each)
    if isinstance(step, LowRank) and step.dropout:
        total += sum(len(group.rows) * _held(tokens, group.columns, each) * 5 // 4 for group in block.groups)
    return total + (_held(tokens, length, each) if step.packing else 0)


def _made(group: Group, hidden: int) -> tuple[int, ...]:
    """Widths of what a group's outputs leave."""
    if group.rows == (hidden,):  # added to what runs past the blocks, which the next norm reads
        return ()
    if len(group.rows) >= 3:  # queries, keys and values, these repeated for every head
        return (max(group.rows),) * 3
    return (*group.rows, max(group.rows)) if len(group.rows) == 2 else group.rows  # a gate is activated


def _held(tokens: int, width: int, each: int) -> int:
    size = tokens * width * each
    return int(HOLES * size) if size < HEAP_BYTES else size


def _logits(shape: Shape, tokens: int, copies: int, each: int) -> int:
    own = _held(tokens, shape.vocabulary, each) if each < FLOAT else 0
    return own + copies * _held(tokens, shape.vocabulary, FLOAT)


def _widest(shape: Shape, tokens: int, each: int) -> int:
    """Gradients inside of a block."""
    widest = max((max(group.rows) for block in shape.blocks for group in block.groups), default=0)
    return 4 * _held(tokens, widest, each)


def _slice(shape: Shape, length: int) -> int:
    """Of float32 logits of so many positions of a sequence as fit in it."""
    return max(16, min(length, CERTIFIER_LOGIT_BYTES // (FLOAT * max(shape.vocabulary, 1)))) * shape.vocabulary * FLOAT
