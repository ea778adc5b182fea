"""What making a model smaller does and takes, from its shape and the spec alone; docs/plan.md has the terms."""

from squeeze.memory import BATCH_TOKENS, LOGIT_BYTES, LOGIT_SLICES, PIECES, PROCESS_BYTES
from squeeze.shapes import Shape
from squeeze.slimming import Slim
from squeeze.specs import JobSpec
from squeeze.training import Train
from squeeze.work import (
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

SEEN_VISITS = 6  # of a number of a hidden state, while what a block does to it is summed
TIMED_TOKENS = 8 * 129  # that go through each block of both models while they are timed


def counted_slimming(shape: Shape, spec: JobSpec, step: Slim) -> dict[str, Count]:
    """The work of such a step, by stage. The smaller model counts as the whole one: it is no more."""
    length, windows = _length(shape, spec), _windows(shape, spec)
    sampled = spec.data.samples * length
    forward = sum(of_token(block, shape, length) for block in shape.blocks)
    reading = sum(of_reading(block, shape) for block in shape.blocks)
    elements = sum(block.elements for block in shape.blocks)
    copying = 2 * shape.stored_bytes * BYTE
    seen = sampled * len(shape.blocks) * SEEN_VISITS * VISIT * shape.hidden
    compared = windows * (2 * of_head(shape) + shape.vocabulary * COMPARED_VISITS * VISIT)
    stages = {
        "loading": Count(TEXTS + TOKEN * (sampled + windows)),
        "compressing": Count(
            copying * shape.outside, (sampled + windows) * forward + reading + seen + copying * elements
        ),
        "evaluating": Count(compared, (windows + 2 * TIMED_TOKENS) * forward + 3 * reading),
    }
    if step is spec.steps[-1]:
        certified = min(windows, max(1, min(CERTIFIED[0], CERTIFIED[1] // length)) * length)
        active = sum(block.active for block in shape.blocks)
        fixed = START + (certified + GENERATED_TOKENS) * of_head(shape) + shape.outside * shape.stored_bytes * BYTE
        blocks = reading + certified * forward + GENERATED_TOKENS * VISIT * active
        stages["certifying"] = Count(len(spec.formats) * fixed, len(spec.formats) * blocks)
    return stages


def slimming_bytes(shape: Shape, spec: JobSpec) -> tuple[int, int]:
    """(whole, least) host memory of the step itself, at its peak: two blocks, both models' heads, what goes through
    them; least: with hidden states on disk.
    """
    each, length = shape.computed_bytes, _length(shape, spec)
    block = max((one.elements for one in shape.blocks), default=0)
    outputs = max((sum(group.share * sum(group.rows) for group in one.groups) for one in shape.blocks), default=0)
    batch = int(max(BATCH_TOKENS, length) * (6 * shape.hidden + outputs) * each)
    logits = LOGIT_SLICES * max(16, min(length, LOGIT_BYTES // (4 * max(shape.vocabulary, 1)))) * shape.vocabulary * 4
    inside = max(2 * block * each + batch, 2 * shape.outside * each + (logits if _windows(shape, spec) else 0))
    streams = (spec.data.samples * length + 2 * _windows(shape, spec)) * shape.hidden * each
    return PROCESS_BYTES + int(PIECES * (inside + streams)), PROCESS_BYTES + int(PIECES * inside)


def _length(shape: Shape, spec: JobSpec) -> int:
    return min(spec.data.length, shape.positions or spec.data.length)


def _windows(shape: Shape, spec: JobSpec) -> int:
    """Tokens that both models are measured on; none where a training follows, which measures on its own text."""
    wanted = spec.evaluation.perplexity or spec.evaluation.divergence
    measured = wanted and not any(isinstance(one, Train) for one in spec.steps)
    return spec.evaluation.samples * _length(shape, spec) * measured
