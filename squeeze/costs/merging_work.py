"""What merging does and takes, from the model's shape and the spec alone; docs/plan.md has the terms."""

from squeeze.costs.training_memory import PEFT_BYTES
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
from squeeze.shapes.model import Shape
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.merging import TIES, Merge
from squeeze.steps.training import Train

MERGE_VISITS = 24  # of an element of a task vector: read, subtracted, compared, counted, its products with the others
TRIM_VISITS = 16  # of one that is trimmed: two more walks, in which halves are counted
PART_BYTES = 48 * (1 << 22)  # of a million elements at once, in float32, with all that is made of them; measured


def counted_merging(shape: Shape, spec: JobSpec, step: Merge) -> dict[str, Count]:
    """The work of a step that merges, by stage, with the evaluation against the base."""
    length = min(spec.data.length, shape.positions or spec.data.length)
    wanted = spec.evaluation.perplexity or spec.evaluation.divergence
    windows = (
        spec.evaluation.samples * length if wanted and not any(isinstance(one, Train) for one in spec.steps) else 0
    )
    each = (len(step.models) + 1) * (shape.stored_bytes * BYTE + VISIT) + len(step.models) * MERGE_VISITS * VISIT
    if isinstance(step, TIES):
        each += len(step.models) * TRIM_VISITS * VISIT
    elements = sum(block.elements for block in shape.blocks)
    forward = sum(of_token(block, shape, length) for block in shape.blocks)
    reading = sum(of_reading(block, shape) for block in shape.blocks)
    stages = {
        "loading": Count(TEXTS + TOKEN * windows),
        "merging": Count(each * shape.outside, each * elements),
    }
    if windows:
        compared = windows * (2 * of_head(shape) + shape.vocabulary * COMPARED_VISITS * VISIT)
        stages["evaluating"] = Count(compared, 2 * (windows * forward + reading))
    if step is spec.steps[-1]:
        seen = min(windows, max(1, min(CERTIFIED[0], CERTIFIED[1] // length)) * length)
        active = sum(block.active for block in shape.blocks)
        fixed = START + (seen + GENERATED_TOKENS) * of_head(shape) + shape.outside * shape.stored_bytes * BYTE
        blocks = reading + seen * forward + GENERATED_TOKENS * VISIT * active
        stages["certifying"] = Count(len(spec.formats) * fixed, len(spec.formats) * blocks)
    return stages


def merging_bytes(largest: int) -> int:
    """Host memory of the merging itself. largest: elements of the largest tensor, which is written in 16 bits."""
    return PEFT_BYTES + 2 * 2 * largest + PART_BYTES
