"""What a training does, counted as `squeeze.costs.work` counts: from the model's shape, the spec and the tokens alone.

A token that is learned from goes forwards through the model and its gradient backwards. Through weights that stay as
they are, backwards costs what forwards does; through weights that learn, twice as much.
"""

from math import ceil

from squeeze.costs.trainable import Learned
from squeeze.costs.work import (
    BYTE,
    CERTIFIED,
    GENERATED_TOKENS,
    KEEP_VISITS,
    START,
    TEXTS,
    TOKEN,
    VISIT,
    Count,
    counted,
    of_head,
    of_reading,
    of_token,
)
from squeeze.shapes.model import Shape
from squeeze.specs.bases import base_of
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import Adapters, Head
from squeeze.steps.training import USUAL_EPOCHS, Train

BYTES_PER_TOKEN = 3.5  # of a user's text, with what JSON has around it
HELD_OUT = 0.1  # share of the examples, where no others are
ORDER_VISITS = 72  # of a score, to find the lowest, and of its weight, to be zero and what it was again; measured
UPDATE_VISITS = 12  # of a parameter in a step of the optimizer: gradient, its norm, two moments, itself


def tokens_to_train(spec: JobSpec, step: Train, length: int, text_bytes: int | None) -> int | None:
    """Tokens that go through the model to be learned from; None where nothing tells. text_bytes: of the examples."""
    wanted = tokens_asked(step, length)
    if wanted is not None or text_bytes is None:
        return wanted
    return max(1, int((step.epochs or USUAL_EPOCHS) * tokens_of_text(spec, text_bytes)))


def tokens_asked(step: Train, length: int) -> int | None:
    """That a training looks at, at most; None where epochs say it."""
    return step.tokens if step.steps is None else step.steps * step.sequences * length


def tokens_of_text(spec: JobSpec, text_bytes: int) -> float:
    """Of the user's examples, without those that are held out."""
    held_out = 0.0 if spec.evaluation.source is not None else HELD_OUT
    return (1 - held_out) * text_bytes / BYTES_PER_TOKEN


def counted_training(
    shape: Shape, spec: JobSpec, step: Train, learned: Learned, tokens: int, *, last: bool, steps: int | None = None
) -> dict[str, Count]:
    """The work of a step that trains, by stage.

    tokens: that are learned from, as often as that. last: no other step follows, and the result is certified. steps: of
    the optimizer; None: as many as there are where sequences are full.
    """
    length = min(spec.data.length, shape.positions or spec.data.length)
    steps = steps or ceil(tokens / (step.sequences * length))
    scored = spec.evaluation.samples * length
    looks = 2 + (steps // step.evaluate_every if step.evaluate_every else 0)
    looks += 2 * isinstance(step, Head)  # for the accuracy
    looks += "gptq" in step.formats  # at the base alone
    looks += step.domain_column is not None  # at the model that was pruned, or what its teacher read before
    forward = [of_token(block, shape, length) for block in shape.blocks]
    through = sum(forward[len(forward) - learned.blocks :])
    again = (1 if learned.apart else 2) + step.activation_checkpointing
    in_blocks = tokens * (sum(forward) + again * through) + looks * scored * sum(forward)
    if learned.rank:
        in_blocks += 6 * tokens * learned.parameters
    heads = (tokens * (2 if learned.apart else 3) + looks * scored) * _of_head(shape, step)
    reading = sum(of_reading(block, shape) for block in shape.blocks)
    stages = {
        "loading": Count(TEXTS + TOKEN * tokens / max(1.0, step.epochs or 1.0) + of_outside(shape), reading),
        "training": Count(heads + steps * VISIT * _update_visits(learned), in_blocks),
        "exporting": _exporting(shape, step, learned, scored, sum(forward), last=last),
    }
    if (beforehand := base_of(shape, spec, step)) is not None:
        base = counted(shape, beforehand)
        stages |= {name: base[name] for name in ("compressing", "evaluating") if name in base}
        if last and "gptq" in spec.formats:
            own, written = stages["exporting"], base["exporting"]
            stages["exporting"] = Count(own.fixed + written.fixed, own.blocks + written.blocks)
    return stages | ({"certifying": _certifying(shape, spec, step, scored, length, sum(forward))} if last else {})


def _update_visits(learned: Learned) -> int:
    """In a step of the optimizer, of all that learns. Scores are ordered first."""
    return UPDATE_VISITS * (learned.parameters + learned.scores) + ORDER_VISITS * learned.scores


def of_outside(shape: Shape) -> float:
    """Of reading what is not in a block."""
    return shape.outside * (shape.stored_bytes * BYTE + VISIT)


def _of_head(shape: Shape, step: Train) -> float:
    """A token's logits; those of labels are next to nothing."""
    return 0.0 if isinstance(step, Head) else of_head(shape)


def _exporting(shape: Shape, step: Train, learned: Learned, scored: int, forward: float, *, last: bool) -> Count:
    """What was learned; and where a whole model is made, all of it, which is then loaded and measured."""
    beside = 2 * 4 * BYTE * learned.parameters * learned.apart
    whole = ("safetensors" in step.formats) if last else step.whole
    if not whole:
        return Count(beside)
    moved = KEEP_VISITS * VISIT * isinstance(step, Adapters) + 4 * shape.stored_bytes * BYTE
    elements = sum(block.elements for block in shape.blocks)
    return Count(beside + scored * _of_head(shape, step) + moved * shape.outside, scored * forward + moved * elements)


def _certifying(shape: Shape, spec: JobSpec, step: Train, scored: int, length: int, forward: float) -> Count:
    """A fresh process for each format: load, score, generate."""
    seen = min(scored, max(1, min(CERTIFIED[0], CERTIFIED[1] // length)) * length)
    blocks = sum(of_reading(block, shape) + GENERATED_TOKENS * VISIT * block.active for block in shape.blocks)
    fixed = START + (seen + GENERATED_TOKENS) * _of_head(shape, step) + of_outside(shape)
    return Count(len(spec.formats) * fixed, len(spec.formats) * (blocks + seen * forward))
