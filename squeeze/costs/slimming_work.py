"""What making a model smaller does and takes, from its shape and the spec alone; docs/plan.md has the terms."""

from collections.abc import Mapping

from squeeze.costs.memory import BATCH_TOKENS, LOGIT_BYTES, LOGIT_SLICES, PIECES, PROCESS_BYTES, certifier_bytes
from squeeze.costs.work import (
    BYTE,
    CERTIFIED,
    COMPARED_VISITS,
    GENERATED_TOKENS,
    START,
    TEXTS,
    TOKEN,
    VISIT,
    Count,
    of_head,
    of_reading,
    of_token,
)
from squeeze.names import Format
from squeeze.shapes.model import Shape
from squeeze.shapes.speed import blocks_at_speed
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.slimming import Depth, Paced, Slim, Vocabulary, Width
from squeeze.steps.training import Train

SEEN_VISITS = 6  # of a number of a hidden state, while what a block does to it is summed
JUDGED_TOKENS = 1 << 15  # at most, of a text that travels once for every block; one sequence at least
BYTES_PER_TOKEN = 4  # of text, about
COUNTED = 1e5  # operations for a token of a text that is counted, and compared by two tokenizers
CORPUS_BYTES = 500 << 20  # of host memory, for a part of a text as tokens
SIZES_TIMED = 18  # of one block, until the one is found that is quick enough
GATHERED_VISITS = 4  # of a weight for every batch, while its gradients are put aside
KEPT_BATCHES = 3  # of a batch that is gone back through: what lies between the products is kept, and has gradients
TIMED_TOKENS = 8 * 129  # that go through each block of both models while they are timed


def counted_slimming(shape: Shape, spec: JobSpec, step: Slim, text_bytes: int | None = None) -> dict[str, Count]:
    """The work of such a step, by stage. The smaller model counts as the whole one: it is no more. text_bytes: of the
    job's text, as far as that is known.
    """
    length, windows = _length(shape, spec), _windows(shape, spec)
    sampled = spec.data.samples * length
    forward = sum(of_token(block, shape, length) for block in shape.blocks)
    reading = sum(of_reading(block, shape) for block in shape.blocks)
    elements = sum(block.elements for block in shape.blocks)
    copying = 2 * shape.stored_bytes * BYTE
    copying_outside = copying * shape.outside
    sampled = _judged_tokens(shape, spec) if by_gradient(step) else sampled
    seen = sampled * len(shape.blocks) * SEEN_VISITS * VISIT * shape.hidden
    judging, heads = _judging(shape, spec, step), 0.0
    if judging is not None:
        sampled = 0  # none but what is judged travels
        seen = judging.whole
    if by_gradient(step):
        batches = -(-sampled // BATCH_TOKENS)
        seen += 4 * sampled * forward + 2 * reading + batches * GATHERED_VISITS * VISIT * elements
        heads = 3 * sampled * of_head(shape) + 2 * batches * GATHERED_VISITS * VISIT * shape.outside
    compared = windows * (2 * of_head(shape) + shape.vocabulary * COMPARED_VISITS * VISIT)
    if isinstance(step, Paced) and step.speed_target is not None:
        seen += SIZES_TIMED * (reading + 2 * TIMED_TOKENS * forward) / max(len(shape.blocks), 1)
        copying_outside += SIZES_TIMED * shape.outside * shape.stored_bytes * BYTE
    stages = {"loading": Count(TEXTS + TOKEN * (sampled + windows))}
    if isinstance(step, Vocabulary):
        told = COUNTED * (text_bytes or 0) / BYTES_PER_TOKEN
        stages["compressing"] = Count(told + copying_outside, copying * elements)
        # Windows by both models, and as many of another text.
        stages["evaluating"] = Count(2 * compared, (4 * windows + 2 * TIMED_TOKENS) * forward + 4 * reading)
    else:
        looked = (sampled + windows) * forward + reading + seen
        stages["compressing"] = Count(copying_outside + heads, looked + copying * elements)
        stages["evaluating"] = Count(compared, (windows + 2 * TIMED_TOKENS) * forward + 3 * reading)
    if step is spec.steps[-1]:
        certified = min(windows, max(1, min(CERTIFIED[0], CERTIFIED[1] // length)) * length)
        active = sum(block.active for block in shape.blocks)
        fixed = START + (certified + GENERATED_TOKENS) * of_head(shape) + shape.outside * shape.stored_bytes * BYTE
        blocks = reading + certified * forward + GENERATED_TOKENS * VISIT * active
        stages["certifying"] = Count(len(spec.formats) * fixed, len(spec.formats) * blocks)
    return stages


def slimming_bytes(shape: Shape, spec: JobSpec, step: Slim) -> tuple[int, int]:
    """(whole, least) host memory of the step itself, at its peak: two blocks, both models' heads, what goes through
    them, or a part of a text as tokens; least: with hidden states on disk.
    """
    each, length = shape.computed_bytes, _length(shape, spec)
    block = max((one.elements for one in shape.blocks), default=0)
    outputs = max((sum(group.share * sum(group.rows) for group in one.groups) for one in shape.blocks), default=0)
    batch = int(max(BATCH_TOKENS, length) * (6 * shape.hidden + outputs) * each)
    logits = LOGIT_SLICES * max(16, min(length, LOGIT_BYTES // (4 * max(shape.vocabulary, 1)))) * shape.vocabulary * 4
    removes = by_removal(step)
    goes_back = by_gradient(step)
    measured = logits if _windows(shape, spec) or removes or goes_back else 0
    inside = max(2 * block * each + batch, 2 * shape.outside * each + measured)
    if goes_back:  # weights, their gradients, and these summed in float32
        inside = max(block * (2 * each + 4) + KEPT_BATCHES * batch, shape.outside * (2 * each + 4) + 2 * measured)
    sampled = _judged_tokens(shape, spec) * (len(shape.blocks) + 1) if removes else spec.data.samples * length
    sampled = _judged_tokens(shape, spec) if goes_back else sampled
    streams = (sampled + 2 * _windows(shape, spec)) * shape.hidden * each
    if isinstance(step, Vocabulary):
        inside, streams = max(inside, CORPUS_BYTES), 4 * _windows(shape, spec) * shape.hidden * each
    return PROCESS_BYTES + int(PIECES * (inside + streams)), PROCESS_BYTES + int(PIECES * inside)


def slimming_memory(
    shape: Shape, spec: JobSpec, step: Slim, smaller: Shape, result_bytes: Mapping[Format, int]
) -> tuple[int, int]:
    """(whole, least) host memory of all processes at one moment. result_bytes: of the weight files of a job that ends
    with this step, whose certifier runs beside the job's process, which then holds nothing; of another job none.
    """
    whole, least = slimming_bytes(shape, spec, step)
    length = _length(shape, spec) if _windows(shape, spec) else None
    certifiers = [certifier_bytes(smaller, length, name, size, whole) for name, size in result_bytes.items()]
    beside = PROCESS_BYTES + max(certifiers) if certifiers else 0
    return max(whole, beside), max(least, beside)


def judged_sequences(count: int, length: int) -> int:
    """Of so many sequences of so many tokens, as many as travel once for every block, the first ones."""
    return min(count, max(1, JUDGED_TOKENS // length))


def by_removal(step: Slim) -> bool:
    """Whether blocks are judged by what is lost without them."""
    return isinstance(step, Depth) and step.importance == "perplexity"


def by_gradient(step: Slim) -> bool:
    """Whether gradients go back through the whole model."""
    return isinstance(step, Width) and step.importance == "gradient"


def looking_bytes(shape: Shape, spec: JobSpec, step: Slim) -> int:
    """On disk, of hidden states that are there for every block: where they are, and where they were at the last
    snapshot; or what each block was given, which does not change.
    """
    if not by_removal(step) and not by_gradient(step):
        return 0
    times = 2 if by_removal(step) else 1
    return times * _judged_tokens(shape, spec) * (len(shape.blocks) + 1) * shape.hidden * shape.computed_bytes


def _judging(shape: Shape, spec: JobSpec, step: Slim) -> Count | None:
    """What it takes to judge blocks by what is lost without them."""
    if not isinstance(step, Depth) or not by_removal(step):
        return None
    tokens, count, total = _judged_tokens(shape, spec), len(shape.blocks), Count()
    each = sum(of_token(block, shape, _length(shape, spec)) for block in shape.blocks) / max(count, 1)
    reading = sum(of_reading(block, shape) for block in shape.blocks) / max(count, 1)
    for left in range(count, count - _rounds(shape, step), -1):
        heads = tokens * (left + 1) * of_head(shape)
        total = total.plus(Count(0.0, tokens * left * (left + 1) / 2 * each + heads + (left < count) * left * reading))
    return total


def _rounds(shape: Shape, step: Depth) -> int:
    """As often as blocks are judged."""
    count = len(shape.blocks)
    if not step.iterative or not count:
        return 1
    if step.blocks is not None:
        return max(1, count - step.blocks)
    if step.speed_target is not None:
        return count - blocks_at_speed(step, [one.active for one in shape.blocks], shape.hidden * shape.vocabulary)
    most = (step.params_target or 1.0) * shape.elements - shape.outside
    return max(1, count - max(1, int(most // max(block.elements for block in shape.blocks))))


def _judged_tokens(shape: Shape, spec: JobSpec) -> int:
    length = _length(shape, spec)
    return judged_sequences(spec.data.samples, length) * length


def _length(shape: Shape, spec: JobSpec) -> int:
    return min(spec.data.length, shape.positions or spec.data.length)


def _windows(shape: Shape, spec: JobSpec) -> int:
    """Tokens that both models are measured on; none where a training follows, which measures on its own text."""
    wanted = spec.evaluation.perplexity or spec.evaluation.divergence
    measured = wanted and not any(isinstance(one, Train) for one in spec.steps)
    return spec.evaluation.samples * _length(shape, spec) * measured
