"""Runs one block over many batches in lock step, so that each linear sees all its calibration inputs before it runs.

Every batch's forward pass is a greenlet that halts when it reaches a linear. Once all have arrived, the linear's
inputs are handed out: statistics are taken, the weight is replaced by its compressed self, and all go on. So each
linear runs once, on inputs that the compressed linears before it made: the true-sequential order of the GPTQ paper at
the price of one forward pass a block. The price is memory: what a block holds half way, for all batches at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from models.calls import Batch, run
from models.statistics import Statistics


def run_in_lockstep(
    block: nn.Module,
    batches: Sequence[Batch],
    linears: Mapping[str, nn.Module],
    gathering: Callable[[int], Statistics],
    solve: Callable[[str, Statistics], None],
) -> list[Tensor]:
    """Calls `solve` for every linear with the statistics of all its inputs, before it runs.

    linears: modules to halt at, by name. gathering: makes statistics for so many columns. solve: replaces the weights
    of a linear, and may do so of others that read the same input. Returns the block's outputs, one for each batch.
    """

    def halt(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            getcurrent().parent.switch((name, inputs[0]))

        return hook

    handles = [module.register_forward_pre_hook(halt(name)) for name, module in linears.items()]
    runners = [greenlet(lambda batch: (None, run(block, batch))) for _ in batches]
    try:
        with torch.no_grad():
            states = [runner.switch(batch) for runner, batch in zip(runners, batches, strict=True)]
            while (name := states[0][0]) is not None:
                statistics = gathering(states[0][1].shape[-1])
                for _, inputs in states:
                    statistics.add(inputs)
                del states, inputs  # or the inputs would stay alive while the linear runs
                solve(name, statistics)
                del statistics
                states = [runner.switch() for runner in runners]
    finally:
        for handle in handles:
            handle.remove()
    return [output for _, output in states]
