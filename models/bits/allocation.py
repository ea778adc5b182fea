"""Mixed precision under a budget: every linear gets as many bits as its share of the loss is worth (bits `auto`).

`sensitivity` beside this module predicts what each candidate costs, `knapsack` finds the best choice that the budget
allows.
Linears that engines compute as one are one item. The budget counts code bits where the request names an average, and
the bytes of all weight files where it names those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.bits.knapsack import Option, solve
from models.bits.sensitivity import GRADIENT_LENGTH, GRADIENT_SEQUENCES, Errors, measure
from models.formats.fitness import stored_alike
from models.formats.packing import words_for
from models.progress import Notify
from models.resources import available_host_bytes
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.streams import Room
from models.weights.quantized import Site
from squeeze.errors import SpecInvalid
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Allocation, Allotment, Optimum, Trial
from squeeze.specs.formats import candidates
from squeeze.steps.quantization import Grouped, Quantize
from squeeze.steps.schemes import Scheme

CURVE_STEP_BITS = 0.25
TENSOR_HEADER_BYTES = 130  # of one tensor in a safetensors file, beside its name; never reached
FILE_HEADER_BYTES = 1024

Group = tuple[str, ...]


def allots(step: Quantize) -> bool:
    return isinstance(step, Grouped) and step.bits == "auto"


def mixed(schemes: Mapping[str, Scheme], bits: Sequence[int]) -> dict[str, Scheme]:
    """The schemes with all candidates in turn: what a format has to hold, whichever will be chosen."""
    groups = stored_alike(schemes)
    return {name: replace(schemes[name], bits=bits[n % len(bits)]) for n, group in enumerate(groups) for name in group}


def allot(
    frame: Frame,
    step: Grouped,
    formats: Sequence[Format],
    calibration: Tensor,
    directory: Path,
    fingerprint: str,
    notify: Notify,
    memory_bytes: int | None = None,
) -> tuple[dict[str, Scheme], Allocation]:
    """How every linear will be stored, and the table that says why.

    calibration: (n, T) int64. directory: keeps what was measured. fingerprint: of all that decides that, the target not
    being part of it. Raises SpecInvalid where the target can't be met.
    """
    schemes = engine.schemes_of(frame, step)
    sites = {site.name: site for n in range(frame.count) for site in frame.sites(n) if site.name in schemes}
    bits = candidates(step, formats)
    groups = stored_alike(sites)
    budget = _budget(frame, step, sites, schemes, bits)
    frame.refuse_misfits()
    notify.stage(Stage.calibrating)
    room = Room(available_host_bytes() // 2 if memory_bytes is None else memory_bytes, directory / "activations")
    errors = measure(frame, step, schemes, bits, calibration, directory, f"{fingerprint} {bits}", room, notify)
    choice = _choose(
        sites, schemes, groups, bits, errors, budget, None if step.target_bytes is None else frame.source.dtype
    )
    count, length = min(len(calibration), GRADIENT_SEQUENCES), min(calibration.shape[1], GRADIENT_LENGTH)
    how = "to nearest" if step.by_block else f"by {step.method}"
    allocation = Allocation(
        measure=f"½ tr(G ΔW H ΔWᵀ) in nats a token, rounded {how}; H from {calibration.numel():,} calibration tokens, "
        f"G from {count * length:,}",
        bits=_average(sites, choice),
        divergence_nats=_predicted(errors, choice),
        layers=[
            Allotment(
                name=name,
                weights=site.rows * site.columns,
                trials=[Trial(bits=one, divergence_nats=errors[name][one]) for one in bits],
                bits=choice[name],
            )
            for name, site in sites.items()
        ],
        curve=_curve(sites, schemes, groups, bits, errors),
    )
    notify.event(
        "info",
        f"{allocation.bits:.3f} bits a code on average: "
        + ", ".join(f"{sum(one == each for one in choice.values())} layers with {each}" for each in bits),
    )
    return {name: replace(scheme, bits=choice[name]) for name, scheme in schemes.items()}, allocation


def _budget(
    frame: Frame, step: Grouped, sites: Mapping[str, Site], schemes: Mapping[str, Scheme], bits: Sequence[int]
) -> int:
    """Bits that all codes may take together, or bytes that all linears may, as they are stored."""
    weights = sum(site.rows * site.columns for site in sites.values())
    if step.target_bits is not None:
        if step.target_bits < bits[0]:
            raise SpecInvalid(
                f"target_bits {step.target_bits:g} is less than the {bits[0]} bits that the formats hold at least",
                param="target_bits",
            )
        return int(step.target_bits * weights)
    assert step.target_bytes is not None
    source = frame.source
    own = {source.file_key(f"{name}.weight") for name in sites}
    rest = sum(
        entry.end - entry.start + TENSOR_HEADER_BYTES + len(name)
        for name, entry in source.entries.items()
        if name not in own
    )
    left = step.target_bytes - rest - FILE_HEADER_BYTES
    least = sum(_stored_bytes(site, replace(schemes[name], bits=bits[0]), source.dtype) for name, site in sites.items())
    if left < least:
        raise SpecInvalid(
            f"target_bytes {step.target_bytes:,} can't be met: {rest + FILE_HEADER_BYTES:,} bytes are not quantized, "
            f"and {bits[0]} bits for all layers take {least:,}",
            param="target_bytes",
        )
    return left


def _curve(
    sites: Mapping[str, Site],
    schemes: Mapping[str, Scheme],
    groups: Sequence[Group],
    bits: Sequence[int],
    errors: Errors,
) -> list[Optimum]:
    """What the best choice promises at every quarter of a bit."""
    weights = sum(site.rows * site.columns for site in sites.values())
    steps = int((bits[-1] - bits[0]) / CURVE_STEP_BITS) + 1
    budgets = [int(weights * (bits[0] + n * CURVE_STEP_BITS)) for n in range(steps)]
    optima = [_choose(sites, schemes, groups, bits, errors, budget) for budget in budgets]
    return [Optimum(bits=_average(sites, one), divergence_nats=_predicted(errors, one)) for one in optima]


def _choose(
    sites: Mapping[str, Site],
    schemes: Mapping[str, Scheme],
    groups: Sequence[Group],
    bits: Sequence[int],
    errors: Errors,
    budget: int,
    dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """The bits of each linear with the least predicted divergence within the budget, which allows the least bits.

    budget: of bits that all codes take; where a dtype (of the model) is given, of bytes that all linears do.
    """

    def cost(name: str, candidate: int) -> int:
        site = sites[name]
        if dtype is not None:
            return _stored_bytes(site, replace(schemes[name], bits=candidate), dtype)
        return site.rows * site.columns * candidate

    items = [
        [Option(sum(cost(name, one) for name in group), sum(errors[name][one] for name in group)) for one in bits]
        for group in groups
    ]
    chosen = solve(items, budget)
    assert chosen is not None
    return {name: bits[place] for group, place in zip(groups, chosen, strict=True) for name in group}


def _stored_bytes(site: Site, scheme: Scheme, dtype: torch.dtype) -> int:
    """Of one linear in compressed-tensors: whole 32-bit words a row, scales in the model's type, the shape, headers."""
    groups = site.columns // scheme.columns(site.columns)
    headers = 3 * (len(site.name) + len(".weight_packed") + TENSOR_HEADER_BYTES)
    return site.rows * (4 * words_for(site.columns, scheme.bits) + dtype.itemsize * groups) + 16 + headers


def _average(sites: Mapping[str, Site], choice: Mapping[str, int]) -> float:
    weights = sum(site.rows * site.columns for site in sites.values())
    return sum(site.rows * site.columns * choice[name] for name, site in sites.items()) / weights


def _predicted(errors: Errors, choice: Mapping[str, int]) -> float:
    return sum(errors[name][bits] for name, bits in choice.items())
