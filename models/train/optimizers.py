"""Optimizers: AdamW, and what takes less memory than its two numbers for every weight that learns."""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from squeeze.errors import SpecInvalid
from squeeze.steps.movement import Movement
from squeeze.steps.training import Train

BETAS, EPSILON = (0.9, 0.999), 1e-8
BLOCK = re.compile(r".*?\.\d+\.")  # the path of a decoder block, at the beginning of a parameter's name
BESIDE = "beside."  # at the beginning of the name of what learns beside the model
CONSTANT = frozenset({"qmap1", "qmap2"})  # of bitsandbytes' state: the values that codes stand for


def optimizer_of(step: Train, learning: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a step asks for. learning: what is to learn, float32, by name."""
    usual: dict[str, Any] = {
        "lr": step.rate,
        "betas": BETAS,
        "eps": EPSILON,
        "weight_decay": step.weight_decay,
    }
    if step.optimizer in ("adamw8bit", "paged_adamw8bit"):
        from bitsandbytes import optim  # which takes a second to import

        kind = optim.AdamW8bit if step.optimizer == "adamw8bit" else optim.PagedAdamW8bit
        found: torch.optim.Optimizer = kind(_groups(step, learning), **usual)
        return found
    if step.optimizer == "galore":
        return GaLore(
            learning,
            rank=step.projection_rank,
            refresh=step.projection_refresh,
            scale=step.projection_scale,
            **usual,
        )
    if step.optimizer == "badam":
        return BAdam(blocks_of(learning), step.block_steps, **usual)
    return torch.optim.AdamW(_groups(step, learning), **usual)


def _groups(step: Train, learning: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Scores beside the weights learn at so many `times` the rate of these, and nothing pulls them to zero."""
    if not isinstance(step, Movement):
        return [{"params": [*learning.values()]}]
    weights = [one for name, one in learning.items() if not name.startswith(BESIDE)]
    scores = [one for name, one in learning.items() if name.startswith(BESIDE)]
    times = step.score_learning_rate / step.rate
    return [{"params": weights}, {"params": scores, "times": times, "weight_decay": 0.0}]


def refuse_without_gpu(step: Train, device: torch.device) -> None:
    """Raises SpecInvalid where a step asks for what only a GPU has."""
    if device.type == "cuda":
        return
    if step.optimizer == "paged_adamw8bit":
        raise SpecInvalid(
            "paged_adamw8bit moves its state between the memory of a GPU and that of its host, and this worker has no "
            "GPU: take adamw8bit, or set limits.gpus to 1",
            param="optimizer",
        )
    if step.precision == "fp16":
        raise SpecInvalid(
            "accelerate scales the loss for fp16 on GPUs alone, and this worker has none: take fp32 or bf16, or set "
            "limits.gpus to 1",
            param="precision",
        )


class GaLore(torch.optim.Optimizer):
    """AdamW whose state, for the matrices of the decoder blocks, is that of a projection of their gradients.

    Source: arXiv 2403.03507, algorithm 2. G: a gradient (m, n). With m ≤ n, P: its first `rank` left singular vectors
    (m, r), found anew every `refresh` steps; AdamW sees PᵀG (r, n), and what it says, N, is taken as `scale`·P·N.
    Otherwise the same from the right. What is not a matrix of a block, or no wider than the rank, has AdamW itself.
    Differs: nothing but float32; gradients are kept until the end of a step, since they are clipped as a whole.
    """

    def __init__(
        self,
        learning: Mapping[str, nn.Parameter],
        *,
        rank: int,
        refresh: int,
        scale: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        projected = [one for name, one in learning.items() if _projectable(name, one, rank)]
        chosen = {id(one) for one in projected}
        rest = [one for one in learning.values() if id(one) not in chosen]
        groups: list[dict[str, Any]] = [{"params": projected, "rank": rank}, {"params": rest, "rank": None}]
        self._refresh, self._scale = refresh, scale
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradient is there"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        G, state, rank = parameter.grad, self.state[parameter], group["rank"]
        assert G is not None, "there is one"
        done = state.setdefault("step", torch.tensor(0.0))
        if rank is not None:
            if int(done) % self._refresh == 0:
                state["projector"] = _projector(G, rank)
            G = _projected(G, state["projector"])
        if int(done) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
        done += 1
        (beta1, beta2), count = group["betas"], float(done)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(G, 1 - beta1)
        v.mul_(beta2).addcmul_(G, G, value=1 - beta2)
        N = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + group["eps"])
        if rank is not None:
            N = self._scale * _taken_back(N, state["projector"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(N, alpha=-group["lr"])


class BAdam(torch.optim.AdamW):
    """AdamW that trains one block at a time: gradients and state are those of the block whose turn it is.

    Source: arXiv 2404.02827, algorithm 1 with a random order; the state of a block begins anew each time. What stands
    outside of the blocks is one more. blocks: of parameters. each: steps of a turn.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Parameter]], each: int, **usual: Any) -> None:
        super().__init__([one for block in blocks for one in block], **usual)
        self._blocks, self._each = blocks, each

    def turn_to(self, number: int) -> None:
        """Has the block learn, and no other, whose turn a step is; the first step is 0."""
        cycle, place = divmod(number // self._each, len(self._blocks))
        active = _order(len(self._blocks), cycle)[place]
        for n, block in enumerate(self._blocks):
            for parameter in block:
                parameter.requires_grad_(n == active)
                if n != active:
                    parameter.grad = None
                    self.state.pop(parameter, None)

    def release(self) -> None:
        """Has all of them learn."""
        for block in self._blocks:
            for parameter in block:
                parameter.requires_grad_(True)


def blocks_of(learning: Mapping[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    """What learns, by decoder block; what stands outside of them is the last."""
    found: dict[str, list[nn.Parameter]] = {}
    outside: list[nn.Parameter] = []
    for name, parameter in learning.items():
        block = BLOCK.match(name)
        (outside if block is None else found.setdefault(block[0], [])).append(parameter)
    return [*found.values(), *([outside] if outside else [])]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer, by its parameters' numbers."""
    return {
        f"optimizer.{n}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for n, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if name not in CONSTANT
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Sets the state that `optimizer_tensors` gave."""
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            number, _, name = rest.partition(".")
            parameter = parameters[int(number)]
            optimizer.state[parameter][name] = _placed(optimizer, parameter, name, value)
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "absmax1" in state:  # bitsandbytes' codes; what they stand for is the same for all
            whole: Any = optimizer
            if "dynamic" not in whole.name2qmap:
                whole.fill_qmap()
            state["qmap1"] = whole.name2qmap["dynamic"].to(parameter.device)
            state["qmap2"] = whole.name2qmap["udynamic"].to(parameter.device)


def _placed(optimizer: Any, parameter: nn.Parameter, name: str, value: Tensor) -> Any:
    """A part of a parameter's state where its optimizer keeps it."""
    if name == "step":
        return value if value.is_floating_point() else int(value)  # bitsandbytes counts in Python
    if name in ("state1", "state2"):
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # which may be paged
    return value.to(parameter.device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _projectable(name: str, parameter: nn.Parameter, rank: int) -> bool:
    return BLOCK.match(name) is not None and parameter.ndim == 2 and min(parameter.shape) > rank


def _projector(G: Tensor, rank: int) -> Tensor:
    """(m, r) where G (m, n) is no higher than wide, else (r, n)."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    P: Tensor = U[:, :rank] if G.shape[0] <= G.shape[1] else Vh[:rank]
    return P.contiguous()


def _projected(G: Tensor, P: Tensor) -> Tensor:
    narrow: Tensor = P.t() @ G if G.shape[0] <= G.shape[1] else G @ P.t()
    return narrow


def _taken_back(N: Tensor, P: Tensor, shape: Iterable[int]) -> Tensor:
    rows, columns = shape
    back: Tensor = P @ N if rows <= columns else N @ P
    return back


@cache
def _order(count: int, cycle: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(cycle).shuffle(order)
    return tuple(order)
