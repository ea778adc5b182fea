"""How much host memory a job will take, from the model's shape and the spec alone; docs/plan.md has the terms.

One block is in memory at a time, so that nothing here grows with the number of blocks but what a certifying process
takes of formats that must be loaded whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from squeeze.costs.work import GRADIENT_ROWS, LEARNED_SEQUENCES, SAMPLED_ROWS, Tokens
from squeeze.names import Format
from squeeze.shapes.model import Block, Group, Shape
from squeeze.specs.formats import CAPACITIES
from squeeze.specs.job_spec import SELF, JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.factoring import SVD
from squeeze.steps.quantization import QAT, SmoothQuant
from squeeze.steps.sparsifying import Sparsify

PIECES = 1.1  # what is freed in pieces between others, and not given back at once
FLOAT, DOUBLE = 4, 8  # bytes of a number that methods work on
ZEROING = 18  # bytes of a weight whose linear is looked at whole: scores, their copy in order with places, what goes
PROCESS_BYTES = 470_000_000  # of a process that has imported what a job or a certifier needs; measured, on a CPU
LOGIT_BYTES, LOGIT_SLICES = 128 << 20, 6  # of one float32 slice of logits, as `models.measuring.evaluation` has it
BATCH_TOKENS = 1024  # that go through a block together on a CPU
BAND_WEIGHTS = 1 << 22  # that are rounded together, errors fed back
LOADING_SHARE, SAMPLING_BYTES = 1.1, (1 << 30) + (512 << 20)  # of a model that samples: loading; keys, values, logits
CERTIFIER_LEAST_BYTES = 600_000_000
CERTIFIER_LOGIT_BYTES, CERTIFIER_LOGIT_SLICES = 256 << 20, 3
LEARNED_SCALE_BYTES = 24  # of a group: scale and zero point at the start, what learns, its gradient and moments
TRAINED_LOGITS = 5  # float32 copies of all logits of a batch: both models' and what is made of them
MOMENT_TILE = 1024  # columns of a second moment that are widened at once
KERNEL_BYTES = 2.0  # of a weight in what gptqmodel's CPU kernels make of its codes
MOVABLE = frozenset({"compressed-tensors", "safetensors"})  # formats whose certifier leaves weights on disk


@dataclass(frozen=True)
class Memory:
    """Bytes. process: with its libraries. block: the weights of the largest block, and its codes so far.

    method: what the method holds beside, of the linears where that is the most. activations: between two blocks.
    half_way: what all calibration batches hold inside of a block. ends: embedding, head and logits, before and after
    the blocks. sampling: a model that makes its own text, whole. training: a model that learns (`qat`), whole.
    certifier: its process.
    """

    process: int
    block: int
    method: int
    activations: int
    half_way: int
    ends: int
    sampling: int
    training: int
    certifier: int

    @property
    def job(self) -> int:
        """Of the job's own process at its peak."""
        return self.process + _pieced(max(self._inside + self.activations + self.half_way, self._before_and_after))

    @property
    def job_least(self) -> int:
        """As `job`, with activations on disk and each block gone through several times."""
        return self.process + _pieced(max(self._inside, self.ends, self.sampling, self.training))

    @property
    def whole(self) -> int:
        """Of all processes of the job at one moment: the certifier runs beside the job's, which then holds nothing."""
        return max(self.job, self.process + self.certifier)

    @property
    def least(self) -> int:
        return max(self.job_least, self.process + self.certifier)

    @property
    def _inside(self) -> int:
        return self.block + self.method

    @property
    def _before_and_after(self) -> int:
        return max(self.ends + self.activations, self.sampling, self.training)


def needed(shape: Shape, spec: JobSpec, result_bytes: Mapping[Format, int] | None = None) -> Memory:
    """The memory of a job. result_bytes: of the weight files, by format; without them no certifier is counted."""
    step = spec.compressing[-1]
    tokens = Tokens.of(shape, spec, step)
    each = shape.computed_bytes
    first = step.begun if isinstance(step, QAT) else step
    twin = "drift" in first.wanted()
    streams = tokens.calibration * (2 if first.by_block or twin else 1) + 2 * tokens.windows
    whole = 0
    if spec.data.source == SELF and step.needs_calibration:
        whole = int(shape.elements * each * LOADING_SHARE) + SAMPLING_BYTES
    inside = [_Inside.of(block, shape, first, tokens) for block in shape.blocks]
    largest = max(inside, key=lambda one: one.block + one.method + one.half_way, default=_Inside(0, 0, 0))
    parts = Memory(
        process=PROCESS_BYTES,
        block=largest.block,
        method=largest.method,
        activations=streams * shape.hidden * each,
        half_way=largest.half_way,
        ends=_ends(shape, step, tokens),
        sampling=whole,
        training=_training(shape, step, tokens) if isinstance(step, QAT) else 0,
        certifier=0,
    )
    # transformers unpacks all layers by the first one's rule when it is to leave their weights on disk.
    movable = frozenset() if getattr(step, "bits", None) == "auto" else MOVABLE
    limits = {name: parts.job if name in movable else None for name in result_bytes or {}}
    length = tokens.length if tokens.windows else None
    certifier = max(
        (certifier_bytes(shape, length, name, size, limits[name]) for name, size in (result_bytes or {}).items()),
        default=0,
    )
    return Memory(**vars(parts) | {"certifier": certifier})


def certifier_bytes(shape: Shape, length: int | None, name: Format, result_bytes: int, job_bytes: int | None) -> int:
    """Of the process that loads a format's result with transformers or ONNX Runtime. length: of the windows that it
    scores, in tokens; None: it scores none. job_bytes: of the job's process, which it does not outgrow where weights
    can be left on disk; None where they can't.
    """
    if not {"transformers", "onnxruntime"} & set(CAPACITIES[name].consumers):
        return 0
    each = shape.computed_bytes
    rest = (shape.elements - shape.weights) * each
    unpacked = shape.weights * (KERNEL_BYTES if name in ("gptq", "awq") else each)
    need = PROCESS_BYTES + result_bytes + rest + int(unpacked)
    if job_bytes is not None:
        need = min(need, max(job_bytes, CERTIFIER_LEAST_BYTES))
    logits = 0 if length is None else CERTIFIER_LOGIT_SLICES * _slice(shape, length, CERTIFIER_LOGIT_BYTES)
    return need + logits


@dataclass(frozen=True)
class _Inside:
    """Of one block, where the sum of the three is the most."""

    block: int
    method: int
    half_way: int

    @classmethod
    def of(cls, block: Block, shape: Shape, step: Compress, tokens: Tokens) -> "_Inside":
        each, twin = shape.computed_bytes, "drift" in step.wanted()
        own = block.elements * each * (2 if twin else 1) + max(1, step.scheme().bits // 8) * block.weights
        batch = min(max(BATCH_TOKENS, tokens.length), max(tokens.calibration, tokens.windows))
        outputs = sum(group.share * sum(group.rows) for group in block.groups)
        running = int(batch * (4 * shape.hidden + outputs) * each)
        if step.by_block:
            return cls(own, max(_learning(block, shape, tokens), running), 0)
        held = tokens.calibration * each * (2 if twin else 1) if step.wanted() else 0
        largest = cls(own, running, 0)
        if isinstance(step, SVD) and step.ranks == "loss":  # before, of one block alone, all statistics at once
            sought = max(_decomposing(group, step) for group in block.groups) if block.groups else 0
            statistics = sum(FLOAT * group.columns**2 for group in block.groups)
            largest = cls(block.elements * each, max(running, sought) + statistics, 0)
        for group in block.groups:
            half_way = int(held * (shape.hidden + group.share * group.columns))
            method = max(_solving(group, step), _keeping(group, step, each), running)
            if own + method + half_way > largest.block + largest.method + largest.half_way:
                largest = cls(own, method, half_way)
        return largest


def sketch_bytes(shape: Shape, step: Compress) -> int:
    """On disk: sums of gradients at the outputs of all linears, where a step weighs by them."""
    if not isinstance(step, SVD) or not step.gradients:
        return 0
    return FLOAT * GRADIENT_ROWS * sum(sum(group.rows) for block in shape.blocks for group in block.groups)


def _solving(group: Group, step: Compress) -> int:
    """The joined weights of all linears that read one input, their statistics, and what the method makes of them."""
    weights, square = group.weights, FLOAT * group.columns**2
    gptq = step.method == "gptq" or (isinstance(step, SmoothQuant) and step.rounding == "gptq")
    rounding = 2 * square + (FLOAT + 2) * weights + 4 * FLOAT * min(weights, BAND_WEIGHTS)
    if step.zeroed and gptq:  # a second factor, and which are zero; a linear is worked on whole until they are found
        one = max(group.rows) * group.columns
        rounding += square + weights + max(0, ZEROING * one - 4 * FLOAT * min(weights, BAND_WEIGHTS))
    if gptq:
        return rounding + (square + 3 * FLOAT * weights if "drift" in step.wanted() else 0)
    if step.method == "awq":
        few = min(sum(group.rows), SAMPLED_ROWS) * group.columns
        return max(4 * square + (1 * weights + 8 * few) * FLOAT, 3 * square + 6 * FLOAT * weights)
    if step.method == "kquant":
        return max(rounding, square + (2 * FLOAT + 2) * weights)
    if isinstance(step, Sparsify):
        return _zeroing(group, step)
    if isinstance(step, SVD):
        if "drift" not in step.wanted():
            return square + _decomposing(group, step)
        fitting = DOUBLE * group.columns**2 + (FLOAT + 2 * DOUBLE) * weights  # a root, what it solves for
        return 2 * square + FLOAT * weights + max(FLOAT * weights + fitting, _decomposing(group, step))
    if step.method == "hqq":
        return 9 * FLOAT * weights
    return (3 * FLOAT + 1) * weights  # the weights, rounded in two steps, the codes


def _zeroing(group: Group, step: Sparsify) -> int:
    """Weights, result; of one linear scores, their copy in order with places, what goes; or, fed back, it thrice."""
    one = max(group.rows) * group.columns
    if step.method == "sparsegpt":
        return 2 * FLOAT * group.columns**2 + (FLOAT + 2) * group.weights + ZEROING * one
    return (FLOAT + 2) * group.weights + (2 * FLOAT + 8 + 2) * one


def _decomposing(group: Group, step: SVD) -> int:
    """The weights, and in float64 these, what is multiplied with them, both factors, as they come and as they are
    stored, and a hole in the heap; of the smaller side what is decomposed, LAPACK's copies and the vectors; a part of
    the inputs' second moment or, where they are fewer than outputs, all of it with its root; of outputs what weighs
    them.
    """
    rows, columns = sum(group.rows), group.columns
    moment = 2 * DOUBLE * columns**2 if rows > columns else DOUBLE * MOMENT_TILE * (rows + columns)
    weighing = (FLOAT * rows + DOUBLE * max(group.rows)) * GRADIENT_ROWS if step.gradients else 0
    return (FLOAT + 6 * DOUBLE) * group.weights + 5 * DOUBLE * min(rows, columns) ** 2 + moment + weighing


def _keeping(group: Group, step: Compress, each: int) -> int:
    """While one of the linears is compared with what it was."""
    one = max(group.rows) * group.columns
    hessian = FLOAT * group.columns**2 if "hessian" in step.wanted() else 0
    return hessian + group.weights + (3 * FLOAT + 2 * each) * one


def _learning(block: Block, shape: Shape, tokens: Tokens) -> int:
    """AutoRound: weights twice, offsets, leaves with gradients, and what a forward pass leaves for the backward one."""
    each = shape.computed_bytes
    linear = max((max(group.rows) * group.columns for group in block.groups), default=0)
    seen = min(LEARNED_SEQUENCES * tokens.length, tokens.calibration)
    kept = sum(group.share * (group.columns + 2 * sum(group.rows)) for group in block.groups)
    passed = int(seen * (kept * each + 6 * FLOAT * shape.hidden))
    return (3 * FLOAT + 2 * each) * block.weights + 7 * FLOAT * linear + passed


def _training(shape: Shape, step: QAT, tokens: Tokens) -> int:
    """QAT: the original; the model, of whose linears there are codes, or weights with gradients and two moments; what
    a forward pass leaves for the backward one; logits.
    """
    each = 2 if step.precision == "bf16" else FLOAT  # `auto` on a CPU
    kept = (4 * FLOAT if step.train == "weights" else 1) * shape.weights
    groups = [group for block in shape.blocks for group in block.groups]
    scales = sum(group.weights // step.scheme().columns(group.columns) for group in groups)
    whole = shape.elements * shape.computed_bytes * step.distill + (shape.elements - shape.weights) * each + kept
    seen = (step.micro_batch_size or step.batch_size) * tokens.length
    passed = [sum(g.share * (g.columns + 2 * sum(g.rows)) for g in block.groups) for block in shape.blocks]
    if step.activation_checkpointing:
        passed = [max(passed, default=0), shape.hidden * len(shape.blocks)]
    largest = max((max(group.rows) * group.columns for group in groups), default=0)
    work = int(seen * each * sum(passed)) + TRAINED_LOGITS * FLOAT * seen * shape.vocabulary + 4 * FLOAT * largest
    return whole + LEARNED_SCALE_BYTES * scales + work


def _ends(shape: Shape, step: Compress, tokens: Tokens) -> int:
    logits = LOGIT_SLICES * _slice(shape, tokens.length, LOGIT_BYTES) if tokens.windows else 0
    rounded = shape.outside * (2 * FLOAT + 1) if step.scheme().element == "ggml" else 0  # as they will be stored
    return shape.outside * shape.computed_bytes + logits + rounded


def _slice(shape: Shape, length: int, most_bytes: int) -> int:
    """Of float32 logits of so many positions of a sequence as fit in it."""
    return max(16, min(length, most_bytes // (FLOAT * max(shape.vocabulary, 1)))) * shape.vocabulary * FLOAT


def _pieced(size_bytes: int) -> int:
    return int(PIECES * size_bytes)
