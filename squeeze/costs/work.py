"""What a job does, counted in floating-point operations from the model's shape and the spec alone; no torch.

A product of (m, k) and (k, n) is 2·m·k·n operations. Work that is not products is counted in the same unit, so that one
speed makes seconds of all of it: a number that is visited once without being multiplied with others as VISIT, a byte
that is read from or written to a file as BYTE, a process that begins with its libraries as START. Everything grows
linearly in the blocks but for what is said to be fixed. `squeeze.costs.pace` makes seconds of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from squeeze.names import Format
from squeeze.shapes.model import Block, Group, Shape
from squeeze.specs.formats import CAPACITIES, candidates
from squeeze.specs.job_spec import SELF, JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.factoring import SVD
from squeeze.steps.quantization import AWQ, GPTQ, HQQ, QAT, AutoRound, Grouped, KQuant, SmoothQuant
from squeeze.steps.sparsifying import SparseGPT, Sparsify, Uneven

# In which a core of the reference machine does 40 operations of a product of two bfloat16 matrices of usual size.
VISIT = 40.0
BYTE = 40.0
START = 5e11
TEXTS = 1e11  # reading the tokenizer and the generic text
TOKEN = 1e6  # of text, until it is a number

# As `Spent.seconds` has them.
STAGES = (
    "loading",
    "merging",
    "teaching",
    "training",
    "allotting",
    "compressing",
    "evaluating",
    "exporting",
    "certifying",
)

TRIAL_VISITS = 6 * 16  # of each weight while its group's scale is searched: shrunken ranges, times what each takes
ROUND_VISITS = 12
KEEP_VISITS = 8  # the weight as it is restored, its error, its place in the block
SOLVER_VISITS = 4 * 15 * 16  # of HQQ on grids with zero points
SEARCH_VISITS = 400  # of the search over llama.cpp's blocks
JUDGED_ROWS = 192  # of a weight, on which its output error is measured: 128 to 255
SAMPLED_ROWS = 1024  # on which AWQ judges a scale
CLIP_STEPS = 20
LEARNED_SEQUENCES = 8  # that a step of AutoRound looks at
LEARN_VISITS = 40  # of a weight in such a step
CHOOSING_VISITS = 16  # of a weight, until it is known whether it becomes zero
# Of n³, until the eigenvectors of (n, n) are known in float64, and until no more than its eigenvalues are; measured.
EIGEN, EIGENVALUES = 50.0, 22.0
DOUBLE = 4.5  # of an operation of a product in float64
ZSTD = 500.0  # of a byte, of source and result, whose size under zstd is measured
ZSTD_BYTES = 1 << 30  # of each, at the most
SKETCHED_TOKENS = (16, 512)  # sequences, and tokens of each, that gradients are taken on
SKETCH_ROWS = 128
GRADIENT_ROWS = 512  # of the sketch that outputs are weighed by
CERTIFIED = (16, 8192)  # windows, and tokens of all together, that a certifying process scores
GENERATED_TOKENS = 24
COMPARED_VISITS = 8  # of a token of the vocabulary where two models' logits are compared
SAMPLED_AT_ONCE = 64  # sequences of the model's own text


@dataclass(frozen=True)
class Count:
    """Operations. fixed: whatever the number of blocks. blocks: of all blocks together."""

    fixed: float = 0.0
    blocks: float = 0.0

    @property
    def whole(self) -> float:
        return self.fixed + self.blocks

    def plus(self, other: "Count") -> "Count":
        return Count(self.fixed + other.fixed, self.blocks + other.blocks)


def counted(shape: Shape, spec: JobSpec) -> dict[str, Count]:
    """The work of a job's steps that compress, by stage, on a model of that shape; a stage without work is left out."""
    found: dict[str, Count] = {}
    for step in spec.compressing:
        formats: tuple[Format, ...] = spec.formats if step is spec.steps[-1] else ("safetensors",)
        alone = spec.model_copy(update={"steps": (step,), "formats": formats})
        for stage, count in _counted(shape, alone, step, last=step is spec.steps[-1]).items():
            found[stage] = found.get(stage, Count()).plus(count)
    return found


def _counted(shape: Shape, spec: JobSpec, step: Compress, *, last: bool) -> dict[str, Count]:
    tokens = Tokens.of(shape, spec, step)
    stages = {"loading": _loading(shape, spec, step, tokens)}
    if isinstance(step, Grouped) and step.bits == "auto":
        stages["allotting"] = _allotting(shape, spec, step, tokens)
    if isinstance(step, Uneven) and step.distribution == "owl":
        stages["allotting"] = _looking(shape, tokens)
    if isinstance(step, SVD):
        stages["allotting"] = _ranking(shape, spec, step, tokens)
    stages["compressing"] = _compressing(shape, step, tokens)
    if isinstance(step, QAT):
        stages["training"] = _training(shape, step, tokens)
    if tokens.windows:
        stages["evaluating"] = _evaluating(shape, tokens)
    stages["exporting"] = _exporting(shape, spec, step)
    if last:
        stages["certifying"] = _certifying(shape, spec, tokens)
    return stages


@dataclass(frozen=True)
class Tokens:
    """length: of a sequence. sampled: of the calibration text. calibration: of it, what layers read while they are
    compressed. windows: of the evaluation's.
    """

    length: int
    sampled: int
    calibration: int
    windows: int

    @classmethod
    def of(cls, shape: Shape, spec: JobSpec, step: Compress) -> "Tokens":
        length = min(spec.data.length, shape.positions or spec.data.length)
        evaluated = spec.evaluation.perplexity or spec.evaluation.divergence
        sampled = spec.data.samples * length * step.needs_calibration
        return cls(length, sampled, sampled * step.reads_inputs, spec.evaluation.samples * length * evaluated)


def _loading(shape: Shape, spec: JobSpec, step: Compress, tokens: Tokens) -> Count:
    """Texts to tokens; a model that samples its own reads all its weights for every token of so many sequences."""
    fixed, blocks = TEXTS + TOKEN * (tokens.sampled + tokens.windows), 0.0
    if spec.data.source == SELF and step.needs_calibration:
        turns = tokens.length * -(-spec.data.samples // SAMPLED_AT_ONCE)
        fixed += tokens.sampled * of_head(shape)
        blocks = sum(tokens.sampled * of_token(block, shape, tokens.length) for block in shape.blocks)
        blocks += turns * VISIT * sum(block.active for block in shape.blocks)
    if step.scheme().element in ("bfloat16", "float16"):  # what a cast loses is counted beforehand
        fixed += shape.outside * (shape.stored_bytes * BYTE + 4 * VISIT)
        blocks += sum(block.elements for block in shape.blocks) * (shape.stored_bytes * BYTE + 4 * VISIT)
    return Count(fixed, blocks)


def _allotting(shape: Shape, spec: JobSpec, step: Grouped, tokens: Tokens) -> Count:
    """Gradients on a part of the text, every layer rounded to every candidate on all of it (`bits: "auto"`)."""
    some = min(spec.data.samples, SKETCHED_TOKENS[0]) * min(tokens.length, SKETCHED_TOKENS[1])
    trials = len(candidates(step, spec.formats))
    blocks = 0.0
    for block in shape.blocks:
        outputs = sum(group.share * sum(group.rows) for group in block.groups)
        blocks += 3 * of_reading(block, shape) + (4 * some + tokens.sampled) * of_token(block, shape, tokens.length)
        blocks += some * 2 * SKETCH_ROWS * outputs
        for group in block.groups:
            blocks += _gathering(group, step, tokens.sampled)
            blocks += trials * (
                _solving(group, step.begun if isinstance(step, QAT) else step) + KEEP_VISITS * VISIT * group.weights
            )
    return Count(3 * some * of_head(shape) + shape.outside * shape.stored_bytes * BYTE, blocks)


def _looking(shape: Shape, tokens: Tokens) -> Count:
    """A pass of the calibration text through the model as it is, and two through the weights."""
    blocks = 0.0
    for block in shape.blocks:
        blocks += of_reading(block, shape) + tokens.calibration * of_token(block, shape, tokens.length)
        for group in block.groups:
            blocks += 2 * VISIT * tokens.calibration * group.share * group.columns + 6 * VISIT * group.weights
    return Count(shape.outside * shape.stored_bytes * BYTE, blocks)


def _ranking(shape: Shape, spec: JobSpec, step: SVD, tokens: Tokens) -> Count:
    """Gradients on a part of the text, then every layer decomposed on all of it, alone and with those beside it."""
    some = min(spec.data.samples, SKETCHED_TOKENS[0]) * min(tokens.length, SKETCHED_TOKENS[1]) * step.gradients
    looked = tokens.sampled * (step.ranks == "loss")
    blocks = 0.0
    for block in shape.blocks:
        blocks += 3 * of_reading(block, shape) + (4 * some + looked) * of_token(block, shape, tokens.length)
        for group in block.groups:
            blocks += some * 2 * GRADIENT_ROWS * group.share * sum(group.rows) + _gathering(group, step, looked)
            if looked:
                alone = [Group(group.columns, (rows,), group.share) for rows in group.rows]
                blocks += sum(_decomposing(one, step, EIGENVALUES) for one in (group, *alone))
    return Count(3 * some * of_head(shape) + shape.outside * shape.stored_bytes * BYTE, blocks)


def _compressing(shape: Shape, step: Compress, tokens: Tokens) -> Count:
    fixed = shape.outside * shape.stored_bytes * BYTE + (tokens.calibration + tokens.windows) * shape.hidden * VISIT
    passes = [step.begun, step] if isinstance(step, QAT) else [step]  # the second with what was learned
    blocks = sum(of_block(block, shape, one, tokens) for one in passes for block in shape.blocks)
    return Count(len(passes) * fixed, blocks)


def _training(shape: Shape, step: QAT, tokens: Tokens) -> Count:
    """Forwards and backwards, which costs twice as much, and forwards through the original; every weight is rounded
    twice a part of a batch. The ends are multiplied backwards once, since they don't learn.
    """
    seen = step.steps * step.batch_size * tokens.length
    parts = step.steps * -(-step.batch_size // (step.micro_batch_size or step.batch_size))
    passes = 3 + step.distill + step.activation_checkpointing
    blocks = sum(passes * seen * of_token(block, shape, tokens.length) for block in shape.blocks)
    blocks += parts * LEARN_VISITS * VISIT * shape.weights
    return Count((2 + step.distill) * seen * of_head(shape), blocks)


def of_block(block: Block, shape: Shape, step: Compress, tokens: Tokens) -> float:
    """Operations of one block's compression, with the windows that run through it before and after."""
    passes = 0 if not tokens.calibration else 3 if step.by_block else 2 if _twice(step) else 1
    moved = passes * tokens.calibration + 2 * tokens.windows
    total = of_reading(block, shape) + moved * of_token(block, shape, tokens.length)
    total += 4 * tokens.windows * shape.hidden * VISIT  # by how much the outputs differ
    for group in block.groups:
        total += _gathering(group, step, tokens.calibration) + _solving(group, step)
        total += (KEEP_VISITS * VISIT + BYTE) * group.weights
        if "hessian" in step.wanted() and tokens.calibration:
            total += sum(2 * min(rows, JUDGED_ROWS) for rows in group.rows) * group.columns**2
    if isinstance(step, AutoRound):
        seen = min(LEARNED_SEQUENCES * tokens.length, tokens.calibration)
        total += step.iterations * 3 * seen * of_token(block, shape, tokens.length)  # backwards costs twice as much
        total += step.iterations * LEARN_VISITS * VISIT * block.weights
    return total


def _twice(step: Compress) -> bool:
    return step.whole_blocks_read or "drift" in step.wanted()


def of_reading(block: Block, shape: Shape) -> float:
    return block.elements * (shape.stored_bytes * BYTE + VISIT)


def of_token(block: Block, shape: Shape, length: int) -> float:
    """Of one token through one block: its weights, its attention to the sequence, what lies between the products."""
    outputs = sum(group.share * sum(group.rows) for group in block.groups)
    return 2 * block.active + 4 * length * shape.hidden + VISIT * (8 * shape.hidden + 2 * outputs)


def of_head(shape: Shape) -> float:
    """Of one token through the output head, with the softmax."""
    return shape.vocabulary * (2 * shape.hidden + 4 * VISIT)


def _gathering(group: Group, step: Compress, tokens: int) -> float:
    """Statistics of one input."""
    n, columns, wanted = tokens * group.share, group.columns, step.wanted()
    moments = 2 * VISIT * n * columns if "moments" in wanted or step.by_block else 0.0
    hessian = n * columns**2 if "hessian" in wanted else 0.0  # a symmetric product: half of one that is not
    return moments + hessian + (2 * n * columns**2 if "drift" in wanted else 0.0)


def _solving(group: Group, step: Compress) -> float:
    """From weights and statistics to codes: of all linears that read one input."""
    if isinstance(step, QAT):
        return 0.0  # known when it learned
    if isinstance(step, Sparsify):
        return _zeroing(group, step)
    return SOLVERS.get(type(step), _to_nearest)(group, step)


def _to_nearest(group: Group, step: Compress) -> float:
    searched = TRIAL_VISITS if step.scheme().element == "int" else 0
    return (searched + ROUND_VISITS) * VISIT * group.weights


def _feeding_back(group: Group) -> float:
    """One factorisation, in³/3, and a product of errors and factor, out·in², for all linears with one input."""
    return group.columns**3 / 3 + group.weights * group.columns + 3 * VISIT * group.columns**2


def _gptq(group: Group, step: Compress) -> float:
    total = _feeding_back(group) + _to_nearest(group, step)
    if step.zeroed:
        total += CHOOSING_VISITS * VISIT * group.weights + group.weights * group.columns
    if "drift" in step.wanted():  # a product, and two triangular systems
        total += 4 * group.weights * group.columns
    return total


def _awq(group: Group, step: Compress) -> float:
    """A scale by trying, each trial with clipped groups, then the clipping of all rows."""
    assert isinstance(step, AWQ)
    columns, rows = group.columns, sum(group.rows)
    few = min(rows, SAMPLED_ROWS)
    clip = CLIP_STEPS * columns * (2 * step.scheme().columns(columns) + 8 * VISIT)  # of a row
    trials = (step.grid + 1) * (few * clip + 2 * few * columns**2 + 4 * VISIT * columns**2)
    return trials + rows * clip + ROUND_VISITS * VISIT * group.weights


def _hqq(group: Group, step: Compress) -> float:
    assert isinstance(step, HQQ)
    return _to_nearest(group, step) if step.symmetric else SOLVER_VISITS * VISIT * group.weights


def _smoothquant(group: Group, step: Compress) -> float:
    assert isinstance(step, SmoothQuant)
    return _gptq(group, step) if step.rounding == "gptq" else _to_nearest(group, step)


def _zeroing(group: Group, step: Compress) -> float:
    choosing = CHOOSING_VISITS * VISIT * group.weights
    return _feeding_back(group) + choosing if isinstance(step, SparseGPT) else choosing


def _kquant(group: Group, step: Compress) -> float:  # noqa: ARG001 - all mixtures take about as long
    return _feeding_back(group) + (SEARCH_VISITS + ROUND_VISITS) * VISIT * group.weights


def _decomposing(group: Group, step: Compress, eigen: float = EIGEN) -> float:  # noqa: ARG001 - whatever is asked
    """Products with the second moments, and the eigenvectors of the smaller side."""
    few, many = sorted((sum(group.rows), group.columns))
    return eigen * few**3 + DOUBLE * (2 * group.weights * group.columns + 6 * few**2 * many)


SOLVERS: Mapping[type[Compress], Callable[[Group, Compress], float]] = {
    GPTQ: _gptq,
    AWQ: _awq,
    HQQ: _hqq,
    SmoothQuant: _smoothquant,
    KQuant: _kquant,
    SVD: _decomposing,
}


def _evaluating(shape: Shape, tokens: Tokens) -> Count:
    """The heads of both models, and their comparison."""
    compared = shape.vocabulary * COMPARED_VISITS * VISIT
    return Count(tokens.windows * (2 * of_head(shape) + compared) + shape.outside * shape.stored_bytes * BYTE)


def _exporting(shape: Shape, spec: JobSpec, step: Compress) -> Count:
    each = KEEP_VISITS * VISIT + BYTE * (1 + step.scheme().bits / 8)
    rest = sum(block.elements - block.weights for block in shape.blocks)
    moved = 2 * shape.stored_bytes * BYTE
    blocks = len(spec.formats) * (each * shape.weights + moved * rest)
    zstd = 2 * ZSTD * min(shape.elements * shape.stored_bytes, ZSTD_BYTES) if step.zeroed else 0.0
    return Count(len(spec.formats) * moved * shape.outside + zstd, blocks)


def _certifying(shape: Shape, spec: JobSpec, tokens: Tokens) -> Count:
    """A fresh process for each format that this installation's own libraries load: load, score, generate."""
    own = [name for name in spec.formats if {"transformers", "onnxruntime"} & set(CAPACITIES[name].consumers)]
    windows = max(1, min(CERTIFIED[0], CERTIFIED[1] // tokens.length)) * tokens.length
    scored = min(tokens.windows, windows)
    blocks = shape.weights * (KEEP_VISITS * VISIT + BYTE)
    blocks += sum(scored * of_token(block, shape, tokens.length) for block in shape.blocks)
    blocks += GENERATED_TOKENS * VISIT * sum(block.active for block in shape.blocks)  # each token reads them all
    fixed = START + (scored + GENERATED_TOKENS) * of_head(shape) + shape.outside * shape.stored_bytes * BYTE
    return Count(len(own) * fixed, len(own) * blocks)
