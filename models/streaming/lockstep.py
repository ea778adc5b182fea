"""Runs one block over many batches in lock step, so that each linear sees all its calibration inputs before it runs.

Every batch's forward pass is a greenlet that halts when it reaches a linear. Once all have arrived, the linear's
inputs are handed out: statistics are taken, the weight is replaced by its compressed self, and all go on. So each
linear runs once, on inputs that the compressed linears before it made: the true-sequential order of the GPTQ paper at
the price of one forward pass a block. The price is memory: what a block holds half way, for all batches at once.
A twin of the block, which stays as it was, may run beside it, for statistics that compare its inputs with the block's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from models.streaming.calls import Batch, run
from models.streaming.statistics import Statistics
from models.streaming.team import SOLO, Team

Twin = tuple[nn.Module, Sequence[Batch], Mapping[str, nn.Module]]  # a block, its batches, its linears by name


def run_in_lockstep(
    block: nn.Module,
    batches: Sequence[Batch],
    linears: Mapping[str, nn.Module],
    gathering: Callable[[int], Statistics],
    solve: Callable[[str, Statistics], None],
    twin: Twin | None = None,
    team: Team = SOLO,
) -> tuple[list[Tensor], list[Tensor]]:
    """Calls `solve` for every linear with the statistics of all its inputs, before it runs.

    linears: modules to halt at, by name. gathering: makes statistics for so many columns. solve: replaces the weights
    of a linear, and may do so of others that read the same input. team: whose processes have some of the batches each,
    at least one; all halt at the same linears. Returns the block's outputs, one for each batch, and its twin's.
    """

    def halt(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            getcurrent().parent.switch((name, inputs[0]))

        return hook

    blocks = [(block, batches, linears)] if twin is None else [(block, batches, linears), twin]
    handles = [one.register_forward_pre_hook(halt(name)) for _, _, by_name in blocks for name, one in by_name.items()]
    runners = [[greenlet(partial(_finish, module)) for _ in own] for module, own, _ in blocks]
    try:
        with torch.no_grad():
            states = [
                [runner.switch(batch) for runner, batch in zip(some, own, strict=True)]
                for some, (_, own, _) in zip(runners, blocks, strict=True)
            ]
            while (name := states[0][0][0]) is not None:
                team.meet(name)
                statistics = gathering(states[0][0][1].shape[-1])
                batches_seen = [tuple(inputs for _, inputs in both) for both in zip(*states, strict=True)]
                statistics.add_in_turn(batches_seen, team)
                del states, batches_seen  # or the inputs would stay alive while the linear runs
                solve(name, statistics)
                del statistics
                states = [[runner.switch() for runner in some] for some in runners]
    finally:
        for handle in handles:
            handle.remove()
    outputs = [[output for _, output in some] for some in states]
    return outputs[0], outputs[1] if twin is not None else []


def _finish(block: nn.Module, batch: Batch) -> tuple[None, Tensor]:
    return None, run(block, batch)
