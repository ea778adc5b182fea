"""Collects the calibration inputs of a block's linears with one batch in memory at a time.

The same statistics as in lock step (`models.streaming.lockstep`), bit for bit, in several passes over the batches
instead of one; but several processes sum what they gathered in another order. A pass gathers the inputs of every linear
that no uncompressed linear stands before: where one is reached, it is handed NaN, and whatever comes out of that is
left for a later pass.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from models.streaming.calls import Batch, run
from models.streaming.lockstep import Twin
from models.streaming.statistics import Statistics
from models.streaming.team import SOLO, Team
from squeeze.errors import NotFinite


class _AllSeen(Exception):
    """Stops a forward pass behind the last linear that this pass can gather."""


def run_in_passes(
    block: nn.Module,
    batches: Sequence[Batch],
    linears: Mapping[str, nn.Module],
    gathering: Callable[[int], Statistics],
    solve: Callable[[str, Statistics], None],
    twin: Twin | None = None,
    team: Team = SOLO,
) -> None:
    """Calls `solve` for every linear with the statistics of all its inputs, those before it compressed already.

    linears: modules by name. gathering: makes statistics for so many columns. solve: replaces the weights of a linear,
    and may do so of others that read the same input. twin: what the inputs are compared with. team: whose processes
    have some of the batches each; a pass gathers for the same linears on all.
    """
    unsolved = dict(linears)
    while unsolved:
        found = _agreed(*_gather(block, batches, unsolved, gathering, twin), team)
        if not found:
            raise NotFinite(f"the inputs of {next(iter(unsolved))} are NaN; the model is damaged")
        for name, statistics in found.items():
            team.meet(name)
            statistics.sum_over(team)
            solve(name, statistics)
            del unsolved[name]


def gathered(
    block: nn.Module,
    batches: Sequence[Batch],
    linears: Mapping[str, nn.Module],
    gathering: Callable[[int], Statistics],
    columns: Mapping[str, int],
    team: Team = SOLO,
) -> dict[str, Statistics]:
    """Of all inputs of all linears, in one pass through the block as it is. columns: that each linear reads."""
    found = {name: gathering(columns[name]) for name in linears}

    def gather(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, given: found[name].add(given[0])

    handles = [module.register_forward_pre_hook(gather(name)) for name, module in linears.items()]
    try:
        for batch in batches:
            run(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in found.items():
        team.meet(name)
        statistics.sum_over(team)
    return found


def _gather(
    block: nn.Module,
    batches: Sequence[Batch],
    linears: Mapping[str, nn.Module],
    gathering: Callable[[int], Statistics],
    twin: Twin | None,
) -> tuple[dict[str, Statistics], set[str]]:
    """(statistics of the linears that read nothing of what the others put out, in the order in which they run, names
    of the others).
    """
    found: dict[str, Statistics] = {}
    tainted: set[str] = set()
    originals: dict[str, Tensor] = {}  # the twin's inputs for the batch at hand
    last: str | None = None  # of the linears that this pass can gather

    def gather(name: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            X = inputs[0]
            if name in tainted or bool(X.isnan().any()):
                tainted.add(name)
                found.pop(name, None)  # an earlier batch had no token for it
                return None
            if name not in found:
                found[name] = gathering(X.shape[-1])
            found[name].add(X, originals.get(name))
            if name == last:
                raise _AllSeen
            return (torch.full_like(X, torch.nan), *inputs[1:])

        return hook

    handles = [module.register_forward_pre_hook(gather(name)) for name, module in linears.items()]
    try:
        for number, batch in enumerate(batches):
            originals = {} if twin is None else _inputs(twin, number)
            with suppress(_AllSeen):
                run(block, batch)
            last = list(found)[-1] if found else None
    finally:
        for handle in handles:
            handle.remove()
    return found, tainted


def _agreed(found: dict[str, Statistics], tainted: set[str], team: Team) -> dict[str, Statistics]:
    """Of what this process found, what can be solved now: the same names in the same order on each.

    A pass reaches every linear on its first batch, so what one process has neither found nor seen tainted is none.
    """
    told = team.gather([sorted(tainted), {name: statistics.count for name, statistics in found.items()}])
    tainted = {name for names, _ in told for name in names}
    counts = {name: sum(own[name] for _, own in told) for name in found if name not in tainted}
    # No token at all may also mean that NaN went the router's other ways; the next pass knows more, if there is one.
    return {name: found[name] for name, count in counts.items() if count} or {name: found[name] for name in counts}


def _inputs(twin: Twin, number: int) -> dict[str, Tensor]:
    """What each linear of the twin reads for one of its batches."""
    block, batches, linears = twin
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            inputs[name] = given[0]

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
    try:
        run(block, batches[number])
    finally:
        for handle in handles:
            handle.remove()
    return inputs
