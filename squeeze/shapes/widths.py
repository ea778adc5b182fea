"""How wide a model is, and which sides of its tensors say so: what is cut to what, from shapes alone; no torch.

A tensor's sides are named: `hidden`, the channels of the hidden state; `inner`, the neurons of the feed-forward part;
`query` and `key`, the heads of queries and those of keys and values, times their dimension.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import Any

from squeeze.errors import ArchitectureUnsupported, SpecInvalid
from squeeze.shapes.bounds import can_be
from squeeze.shapes.model import BLOCK, number_of
from squeeze.shapes.speed import products
from squeeze.steps.slimming import MULTIPLE, Width

Sides = Mapping[str, tuple[int, ...]]
LEAST_SHARE = 0.5  # of neurons, then of heads, then of channels, that `params_target` leaves before the next are cut

AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, "hidden"),
    "lm_head.weight": (None, "hidden"),
    "norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
    "q_proj.weight": ("query", "hidden"),
    "q_proj.bias": ("query",),
    "k_proj.weight": ("key", "hidden"),
    "k_proj.bias": ("key",),
    "v_proj.weight": ("key", "hidden"),
    "v_proj.bias": ("key",),
    "o_proj.weight": ("hidden", "query"),
    "o_proj.bias": ("hidden",),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "gate_proj.weight": ("inner", "hidden"),
    "gate_proj.bias": ("inner",),
    "up_proj.weight": ("inner", "hidden"),
    "up_proj.bias": ("inner",),
    "down_proj.weight": ("hidden", "inner"),
    "down_proj.bias": ("hidden",),
}


@dataclass(frozen=True)
class Family:
    """What differs between families whose blocks have these tensors.

    before: a block's norms that are given the hidden state. behind: those that are given what is then added to it.
    shifted: norms multiply by one more than their weight. scaled: embeddings are multiplied by the root of how many
    channels there are. square: llama.cpp (0.3.36 of its Python) loads them with as many channels as queries alone.
    """

    before: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    behind: tuple[str, ...] = ()
    shifted: bool = False
    scaled: bool = False
    square: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        return self.before + self.behind


_GEMMA_WITH_NORMS_BEHIND = Family(
    before=("input_layernorm", "pre_feedforward_layernorm"),
    behind=("post_attention_layernorm", "post_feedforward_layernorm"),
    shifted=True,
    scaled=True,
)
# Of which it was tried that what is left is what it was.
FAMILIES: dict[str, Family] = {
    "gemma": Family(shifted=True, scaled=True),
    "gemma2": _GEMMA_WITH_NORMS_BEHIND,
    "gemma3_text": _GEMMA_WITH_NORMS_BEHIND,
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(square=True),
    "qwen3": Family(),
    "smollm3": Family(),
}


@dataclass(frozen=True)
class Widths:
    """groups: of heads that share keys and values. each: heads of a group. dimension: of a head. square: there are to
    be as many channels as heads times their dimension.
    """

    hidden: int
    inner: int
    groups: int
    each: int
    dimension: int
    square: bool = False

    @property
    def heads(self) -> int:
        return self.groups * self.each

    def side(self, axis: str) -> int:
        return {
            "hidden": self.hidden,
            "inner": self.inner,
            "query": self.heads * self.dimension,
            "key": self.groups * self.dimension,
        }[axis]

    @property
    def settings(self) -> dict[str, int]:
        """As config.json has them."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.dimension,
        }


def widths_of(config: Mapping[str, Any], sides: Sides) -> Widths:
    """Of a model. Raises ArchitectureUnsupported where nobody has tried to cut its family."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ArchitectureUnsupported(
            f"a {kind} can't be cut in width; {', '.join(FAMILIES)} can. Take the method depth", param="method"
        )
    # By the tensors: what a config leaves out, each family fills in by rules of its own.
    found = {axis: side for name in sides for axis, side in zip(axes_of(name), sides[name], strict=True)}
    heads, rows = number_of(config, "num_attention_heads"), found.get("query", 0)
    dimension = rows // heads if heads else 0
    groups = found.get("key", 0) // dimension if dimension else 0
    if not groups or heads % groups or rows != heads * dimension or found["key"] != groups * dimension:
        raise ArchitectureUnsupported("the heads of this model are in no whole groups, so that none can be left out")
    square = FAMILIES[str(kind)].square and found["hidden"] == rows
    return Widths(found["hidden"], found["inner"], groups, heads // groups, dimension, square)


def axes_of(name: str) -> tuple[str | None, ...]:
    """The sides of a tensor, by its name in the files. Raises where it is none that these families have."""
    found = AXES.get(".".join(name.rsplit(".", 2)[-2:]))
    if found is None:
        raise ArchitectureUnsupported(f"the model has a tensor {name}, which nobody has tried to cut in width")
    return found


def sides_at(widths: Widths, sides: Sides) -> dict[str, tuple[int, ...]]:
    """Shapes of the same tensors in a model of these widths."""
    return {
        name: tuple(was if axis is None else widths.side(axis) for axis, was in zip(axes_of(name), each, strict=True))
        for name, each in sides.items()
    }


def widths_left(step: Width, config: Mapping[str, Any], sides: Sides) -> Widths:
    """What a step leaves of a model; with a `speed_target` an estimate. sides: of what is carried over.

    Raises SpecInvalid, with what would do.
    """
    whole = widths_of(config, sides)
    if step.speed_target is not None:
        return _at_speed(step, config, whole, sides)
    if step.params_target is None:
        return _asked(step, whole)
    share = partial(_elements, sides=sides)
    most, path = step.params_target * share(whole), narrowing(whole)
    for one in path:
        if share(one) <= most:
            return next(each for each in fuller(one, whole) if share(each) <= most)
    least = ceil(1000 * share(path[-1]) / share(whole)) / 1000
    if least >= 1:
        raise SpecInvalid(
            f"the model is too narrow to be cut: it has {whole.inner} neurons, {whole.heads} heads and {whole.hidden} "
            f"channels, and of these {MULTIPLE}, {whole.each} and {MULTIPLE} go together; take depth",
            param="params_target",
        )
    raise SpecInvalid(
        f"half of the neurons, of the heads and of the channels is what a target leaves at least, and that is "
        f"{least:.1%} of the parameters: the least that params_target can be is {least:g}; or say the sizes themselves",
        param="params_target",
    )


def narrowing(whole: Widths) -> list[Widths]:
    """What a target tries, from the model itself to half of its neurons, then of its heads, then of its channels; of
    these two at once, where there are to be as many.
    """
    fewest = ceil(LEAST_SHARE * whole.groups)
    flat = replace(whole, inner=_half(whole.inner))
    neurons = [replace(whole, inner=inner) for inner in _multiples(whole.inner)]
    if whole.square:
        fewer = (replace(flat, groups=groups) for groups in range(whole.groups - 1, fewest - 1, -1))
        squares = [replace(one, hidden=one.heads * one.dimension) for one in fewer]
        return [*neurons, *(one for one in squares if one.hidden % MULTIPLE == 0)]
    return [
        *neurons,
        *(replace(flat, groups=groups) for groups in range(whole.groups - 1, fewest - 1, -1)),
        *(replace(flat, groups=fewest, hidden=hidden) for hidden in list(_multiples(whole.hidden))[1:]),
    ]


def fuller(one: Widths, whole: Widths) -> list[Widths]:
    """The same with more neurons, from all that the model has: what room the last step left is theirs."""
    return [replace(one, inner=inner) for inner in _multiples(whole.inner) if inner >= one.inner]


def _at_speed(step: Width, config: Mapping[str, Any], whole: Widths, sides: Sides) -> Widths:
    """About what a target of speed leaves, by multiply-adds. Raises where half of everything would miss it for sure."""
    assert step.speed_target is not None, "asked for where there is one"
    target, path, vocabulary = step.speed_target, narrowing(whole), number_of(config, "vocab_size")

    def work(widths: Widths) -> float:
        return products(_of_blocks(widths, sides), widths.hidden * vocabulary, step.speed_of)

    most = _of_blocks(whole, sides) / _of_blocks(path[-1], sides)
    if target >= most:
        raise SpecInvalid(
            f"half of the neurons, of the heads and of the channels is what a target leaves at least, and with that a "
            f"model is less than {most:.3g} times as fast: speed_target is less than that, not {target:g}; or say the "
            "sizes themselves",
            param="speed_target",
        )
    found = next((one for one in path[1:] if work(one) * target <= work(whole)), path[-1])
    quick = (each for each in fuller(found, whole) if each != whole and work(each) * target <= work(whole))
    return next(quick, found)


def _of_blocks(widths: Widths, sides: Sides) -> float:
    """Weights of the blocks that tokens are multiplied with."""
    cut = sides_at(widths, sides)
    return sum(prod(each) for name, each in cut.items() if len(each) > 1 and BLOCK.search(name))


def _asked(step: Width, whole: Widths) -> Widths:
    for field, asked, has, what, by in (
        ("intermediate_size", step.intermediate_size, whole.inner, "neurons", MULTIPLE),
        ("hidden_size", step.hidden_size, whole.hidden, "channels", MULTIPLE),
        ("heads", step.heads, whole.heads, "heads", whole.each),
    ):
        most = (has - 1) // by * by
        if asked is not None and not most:
            raise SpecInvalid(
                f"the model has {has} {what}, and {by} of them go together, so that none can go: leave `{field}` out",
                param=field,
            )
        if asked is not None and asked >= has:
            raise SpecInvalid(
                f"the model has {has} {what}, and fewer are to stay: {can_be(field, by, most, by)}, not {asked}",
                param=field,
            )
    if step.heads is not None and step.heads % whole.each:
        below = step.heads // whole.each * whole.each
        near = " or ".join(str(one) for one in (below, below + whole.each) if 0 < one < whole.heads)
        raise SpecInvalid(
            f"{whole.each} heads share their keys and values, and go together: heads={step.heads} can't be, {near} can",
            param="heads",
        )
    left = replace(
        whole,
        inner=step.intermediate_size or whole.inner,
        hidden=step.hidden_size or whole.hidden,
        groups=(step.heads or whole.heads) // whole.each,
    )
    if whole.square and left.hidden != left.heads * whole.dimension:
        _refuse_oblong(step, whole)
    return left


def _refuse_oblong(step: Width, whole: Widths) -> None:
    """Raises SpecInvalid, with the pairs of sizes that would do."""
    fewer = (replace(whole, groups=groups) for groups in range(whole.groups - 1, 0, -1))
    squares = [(one.heads, one.heads * one.dimension) for one in fewer if one.heads * one.dimension % MULTIPLE == 0]
    near = sorted(squares, key=lambda one: abs(one[0] - (step.heads or (step.hidden_size or 0) / whole.dimension)))[:2]
    pairs = " or ".join(f"heads={heads} with hidden_size={hidden}" for heads, hidden in sorted(near))
    raise SpecInvalid(
        f"a model of this family has as many channels as heads times their dimension ({whole.dimension}), or llama.cpp "
        f"does not load it: say {pairs or 'intermediate_size alone'}",
        param="hidden_size" if step.heads is None else "heads",
    )


def _elements(widths: Widths, sides: Sides) -> int:
    return sum(map(prod, sides_at(widths, sides).values()))


def _multiples(size: int) -> Iterator[int]:
    """From the size itself down to half of it: what later rounding in groups can divide."""
    by = _grain(size)
    yield size
    yield from range((size - 1) // by * by, _half(size) - 1, -by)


def _half(size: int) -> int:
    by = _grain(size)
    return min(size, ceil(LEAST_SHARE * size / by) * by)


def _grain(size: int) -> int:
    """The largest usual size of a group that divides it, and is small beside it."""
    return next((by for by in (128, 64) if size % by == 0 and 8 * by <= size), MULTIPLE)
