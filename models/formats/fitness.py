"""Whether layers fit what the formats share: groups that divide the inputs, words that end where a layer ends."""

import math
from collections.abc import Collection, Iterable

from models.formats.packing import WORD_BITS
from models.quantized import Site, group_columns
from squeeze.errors import FormatUnfit, GroupSizeIndivisible
from squeeze.steps import Quantize

GROUP_SIZES = (32, 64, 128)

# Linears that vLLM computes as one and therefore wants quantized alike.
FUSIONS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def refuse_torn_groups(sites: Collection[Site], step: Quantize) -> None:
    """Raises where the last group of a row would be shorter than the others."""
    torn = next((site for site in sites if site.columns % group_columns(step, site)), None)
    if torn is None:
        return
    fitting = [str(size) for size in GROUP_SIZES if not any(site.columns % size for site in sites)]
    raise GroupSizeIndivisible(
        f"group_size {step.group_size} doesn't divide the {torn.columns} inputs of {torn.name}; for all layers "
        f"{' and '.join([*fitting, '`channel`'])} would do",
        param="group_size",
    )


def refuse_torn_words(site: Site, step: Quantize, format_name: str) -> None:
    """Raises where codes along the inputs, or zero points along the outputs, would end within a 32-bit word."""
    unit = WORD_BITS // math.gcd(WORD_BITS, step.bits)
    for count, what in ((site.columns, "inputs"), (site.rows, "outputs")):
        if count % unit:
            fitting = [bits for bits in (2, 3, 4, 8) if count % (WORD_BITS // math.gcd(WORD_BITS, bits)) == 0]
            instead = f"use {' or '.join(map(str, fitting))} bits, " if fitting else ""
            raise FormatUnfit(
                f"{format_name} packs {step.bits}-bit codes into 32-bit words, so that a layer's {what} must be a "
                f"multiple of {unit}; {site.name} has {count}: {instead}name it in `ignore`, or ask for "
                "compressed-tensors alone",
                param="formats",
            )


def torn_fusions(sites: Collection[str], ignored: Iterable[str]) -> list[str]:
    """Groups of layers that vLLM fuses of which only a part is quantized, as `<parent>.{q_proj, k_proj, v_proj}`."""
    torn = {
        f"{parent}.{{{', '.join(parts)}}}"
        for parent, _, leaf in (name.rpartition(".") for name in ignored)
        for parts in FUSIONS.values()
        if leaf in parts and any(f"{parent}.{part}" in sites for part in parts)
    }
    return sorted(torn)


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
