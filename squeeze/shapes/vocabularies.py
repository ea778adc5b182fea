"""How many tokens a model has left, and which of its tensors have a row for each, from shapes alone; no torch."""

import re
from collections.abc import Mapping
from math import ceil, prod
from typing import Any

from squeeze.errors import ArchitectureUnsupported, SpecInvalid
from squeeze.shapes.model import number_of
from squeeze.steps.slimming import Vocabulary

# Embedding and output head, as the files of all known families call them, with the head's bias.
ROWS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.(weight|bias)$")
SIZE = "vocab_size"
Sides = Mapping[str, tuple[int, ...]]


def rows_of(config: Mapping[str, Any], sides: Sides) -> int:
    """Tokens that a model has a row for. sides: of its tensors by their names.

    Raises ArchitectureUnsupported where the tensors don't show that.
    """
    found = {sides[name][0] for name in sides if ROWS.search(name)}
    rows = number_of(config, SIZE) or next(iter(found), 0)
    if found != {rows} or not rows:
        raise ArchitectureUnsupported(
            "the model's embedding and output head are not found by their names and its config's vocab_size, so that "
            "its vocabulary can't be trimmed",
            param="method",
        )
    return rows


def row_elements(sides: Sides) -> int:
    """Parameters that go with a token."""
    return sum(prod(each[1:]) for name, each in sides.items() if ROWS.search(name))


def rows_asked(step: Vocabulary, config: Mapping[str, Any], sides: Sides) -> int | None:
    """Tokens that a step is to leave; None: as many as the text needs. Raises SpecInvalid, with what would do."""
    rows, multiple = rows_of(config, sides), step.multiple
    most = (rows - 1) // multiple * multiple
    if most < 1:
        raise SpecInvalid(
            f"the model has {rows} tokens, of which no multiple of {multiple} is less: take a smaller `multiple`",
            param="multiple",
        )
    if step.size is not None:
        if step.size > most:
            raise SpecInvalid(
                f"the model has {rows} tokens, and fewer are to stay: `size` can be at most {most}, not {step.size}",
                param="size",
            )
        return step.size
    if step.params_target is None:
        return None
    whole, each = sum(map(prod, sides.values())), row_elements(sides)
    left = int((step.params_target * whole - (whole - rows * each)) // each) // multiple * multiple
    if left < multiple:
        least = ceil(1000 * (whole - (rows - multiple) * each) / whole) / 1000
        raise SpecInvalid(
            f"without any token {(whole - rows * each) / whole:.1%} of the parameters stay: the least that "
            f"params_target can be is {least:g}, and more where the text needs more tokens",
            param="params_target",
        )
    return min(left, most)


def with_rows(rows: int, sides: Sides) -> dict[str, tuple[int, ...]]:
    """Shapes of the same tensors with so many tokens."""
    return {name: (rows, *each[1:]) if ROWS.search(name) else each for name, each in sides.items()}
