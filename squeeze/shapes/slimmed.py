"""What a model that is made smaller has of each tensor, from its config and shapes alone; no torch."""

from collections.abc import Mapping
from math import ceil, prod
from typing import Any, TypeVar

from squeeze.errors import SpecInvalid
from squeeze.shapes.bounds import can_be
from squeeze.shapes.mixtures import experts_left, with_experts
from squeeze.shapes.model import BLOCK, COMPUTED, number_of, of_blocks, shape_of
from squeeze.shapes.speed import blocks_at_speed
from squeeze.shapes.vocabularies import SIZE, rows_asked, rows_of, with_rows
from squeeze.shapes.widths import sides_at, widths_left
from squeeze.steps.slimming import Depth, Experts, Slim, Vocabulary, Width

Each = TypeVar("Each")
Sides = Mapping[str, tuple[int, ...]]  # of tensors, by their names
COUNTS = ("num_hidden_layers", "n_layer", "n_layers")


def carried(config: Mapping[str, Any], tensors: Mapping[str, Each]) -> dict[str, Each]:
    """What of a model's tensors a smaller one is made of: without what models compute, and without blocks beyond the
    config's, which only predict further tokens.
    """
    count = number_of(config, *COUNTS)
    found = {name: each for name, each in tensors.items() if not COMPUTED.search(name)}
    return of_blocks(found, range(count)) if count else found


def elements_of(sides: Sides) -> int:
    """Parameters of a model with these tensors."""
    return sum(map(prod, sides.values()))


def narrowed(step: Slim, config: Mapping[str, Any], sides: Sides) -> tuple[dict[str, Any], Sides]:
    """(settings, shapes) of what a step makes of a model, at most where that hangs on its text. sides: of what is
    `carried`. Raises as `blocks_left`.
    """
    if isinstance(step, Width):
        widths = widths_left(step, config, sides)
        return {**config, **widths.settings}, sides_at(widths, sides)
    if isinstance(step, Vocabulary):
        rows = rows_asked(step, config, sides) or rows_of(config, sides)
        return {**config, SIZE: rows}, with_rows(rows, sides)
    if isinstance(step, Experts):
        return with_experts(experts_left(step, config, sides), config, sides)
    assert isinstance(step, Depth), "there is no other method"
    left = blocks_left(step, config, sides)
    counts = {name: left for name in COUNTS if name in config}
    return {**config, **counts}, of_blocks(sides, range(left))


def blocks_left(step: Depth, config: Mapping[str, Any], sides: Sides) -> int:
    """Decoder blocks that a step leaves of a model; with a `speed_target` an estimate. sides: of what is `carried`.

    Raises SpecInvalid, with what would do, where that can't be.
    """
    sizes = block_sizes(sides)
    count = len(sizes)
    if count < 2:
        asked = {"blocks": step.blocks, "speed_target": step.speed_target, "params_target": step.params_target}
        param = next(name for name, value in asked.items() if value is not None)
        raise SpecInvalid("the model has one decoder block, and can't do without it: take width", param=param)
    if step.blocks is not None:
        if step.blocks >= count:
            raise SpecInvalid(
                f"the model has {count} decoder blocks, and fewer are to stay: {can_be('blocks', 1, count - 1)}, not "
                f"{step.blocks}",
                param="blocks",
            )
        return step.blocks
    if step.speed_target is not None:
        shape = shape_of(config, sides)
        return blocks_at_speed(step, [block.active for block in shape.blocks], shape.hidden * shape.vocabulary)
    assert step.params_target is not None, "a step says how small"
    whole, each = elements_of(sides), max(sizes)
    if min(sizes) != each:
        raise SpecInvalid(
            "the decoder blocks of this model are not of one size, so that a share depends on which ones go: say "
            "`blocks` instead",
            param="params_target",
        )
    outside = whole - count * each
    left = min(count - 1, int((step.params_target * whole - outside) // each))
    if left < 1:
        least = ceil(1000 * (outside + each) / whole) / 1000
        raise SpecInvalid(
            f"with one decoder block of {count} left, {least:.1%} of the parameters stay: the least that params_target "
            f"can be is {least:g}",
            param="params_target",
        )
    return left


def block_sizes(sides: Sides) -> list[int]:
    """Parameters of each decoder block, in order."""
    sizes: dict[int, int] = {}
    for name, each in sides.items():
        if (found := BLOCK.search(name)) is not None:
            sizes[int(found[1])] = sizes.get(int(found[1]), 0) + prod(each)
    return [sizes[number] for number in sorted(sizes)]
