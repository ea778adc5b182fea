"""Whether layers fit what the formats share: groups that divide the inputs, words that end where a layer ends."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from models.formats.packing import WORD_BITS
from models.weights.quantized import Site
from squeeze.errors import FormatUnfit, GroupSizeIndivisible
from squeeze.steps.schemes import Scheme

GROUP_SIZES = (32, 64, 128)

# Linears that vLLM computes as one and therefore wants quantized alike.
FUSIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
}


def refuse_torn_groups(sites: Collection[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises where the last group of a row would be shorter than the others."""
    torn = next((site for site in sites if site.columns % schemes[site.name].columns(site.columns)), None)
    if torn is None:
        return
    fitting = [str(size) for size in GROUP_SIZES if not any(site.columns % size for site in sites)]
    raise GroupSizeIndivisible(
        f"group_size {schemes[torn.name].group_size} doesn't divide the {torn.columns} inputs of {torn.name}; for all "
        f"layers {' and '.join([*fitting, '`channel`'])} would do",
        param="group_size",
    )


def refuse_torn_words(site: Site, scheme: Scheme, format_name: str) -> None:
    """Raises where codes along the inputs, or zero points along the outputs, would end within a 32-bit word."""
    unit = WORD_BITS // math.gcd(WORD_BITS, scheme.bits)
    for count, what in ((site.columns, "inputs"), (site.rows, "outputs")):
        if count % unit:
            fitting = [bits for bits in (2, 3, 4, 8) if count % (WORD_BITS // math.gcd(WORD_BITS, bits)) == 0]
            instead = f"use {' or '.join(map(str, fitting))} bits, " if fitting else ""
            raise FormatUnfit(
                f"{format_name} packs {scheme.bits}-bit codes into 32-bit words, so that a layer's {what} must be a "
                f"multiple of {unit}; {site.name} has {count}: {instead}name it in `ignore`, or ask for "
                "compressed-tensors alone",
                param="formats",
            )


def torn_fusions(
    sites: Collection[str], ignored: Iterable[str], schemes: Mapping[str, Scheme] | None = None
) -> list[str]:
    """Groups of layers that vLLM fuses but that are not stored alike, as `<parent>.{q_proj, k_proj, v_proj}`.

    ignored: layers left in 16 bits. schemes: of the others; None: one for all.
    """
    left, torn = set(ignored), set()
    for group in stored_alike([*sites, *left]):
        ways = {None if name in left else schemes[name] if schemes else "alike" for name in group}
        if len(ways) > 1:
            torn.add(_in_short(group))
    return sorted(torn)


def stored_alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers, in groups of those that vLLM computes as one and that must therefore be stored in one way: q, k and
    v, gate and up, and all experts of a mixture. A layer that nothing is fused with is a group of its own.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for group in computed_as_one(names):
        mixture, experts, _ = group[0].rpartition(".experts.")
        key = mixture + experts if experts else group[0]
        groups[key] = groups.get(key, ()) + group
    return list(groups.values())


def computed_as_one(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers, in groups of those that engines join into one with more outputs: q, k and v, gate and up."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        whole = next((whole for whole, parts in FUSIONS.items() if leaf in parts), None)
        groups.setdefault(f"{parent}.{whole}" if whole else name, []).append(name)
    return [tuple(group) for group in groups.values()]


def fused_names(names: Collection[str]) -> list[str]:
    """Names of vLLM's fused layers whose parts are all among `names`."""
    held = set(names)
    fused = {
        f"{parent}.{whole}"
        for parent, _, leaf in (name.rpartition(".") for name in held)
        for whole, parts in FUSIONS.items()
        if leaf in parts and all(f"{parent}.{part}" in held for part in parts)
    }
    return sorted(fused)


def _in_short(group: Sequence[str]) -> str:
    mixture, experts, _ = group[0].rpartition(".experts.")
    if experts:
        return f"{mixture}.experts"
    parent, _, leaf = group[0].rpartition(".")
    return f"{parent}.{{{', '.join(next(parts for parts in FUSIONS.values() if leaf in parts))}}}"
