"""Runs one block over many batches in lock step, so that each linear sees all its calibration inputs before it runs.

Every batch's forward pass is a greenlet that halts when it reaches a linear. Once all have arrived, the linear's
inputs are handed out: statistics are taken, the weight is replaced by its compressed self, and all go on. So each
linear runs once, on inputs that the compressed linears before it made: the true-sequential order of the GPTQ paper at
the price of one forward pass a block. The price is memory: what a block holds half way, for all batches at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn


def run_in_lockstep(
    block: nn.Module,
    batches: Sequence[tuple[Tensor, tuple[Any, ...], dict[str, Any]]],
    linears: dict[str, nn.Module],
    arrive: Callable[[str, list[Tensor]], None],
) -> list[Tensor]:
    """The block's outputs, one for each batch.

    batches: hidden states (B, T, C) and the other arguments of the block's call.
    linears: modules to halt at, by name. arrive: called with a name and every batch's input (…, in) before it runs.
    """

    def halt(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            getcurrent().parent.switch((name, inputs[0]))

        return hook

    handles = [module.register_forward_pre_hook(halt(name)) for name, module in linears.items()]
    runners = [greenlet(lambda hidden, args, kwargs: (None, block(hidden, *args, **kwargs))) for _ in batches]
    try:
        with torch.no_grad():
            states = [runner.switch(*batch) for runner, batch in zip(runners, batches, strict=True)]
            while (name := states[0][0]) is not None:
                arrive(name, [value for _, value in states])
                del states  # or the inputs would stay alive while the linear runs
                states = [runner.switch() for runner in runners]
    finally:
        for handle in handles:
            handle.remove()
    return [output[0] if isinstance(output, tuple) else output for _, output in states]
