"""Several processes that share one training: who holds which weights, who looks at which sequences, how sums are made.

torch's own DistributedDataParallel and fully_shard (FSDP2, arXiv 2304.11277), the same on GPUs and on the CPU; where
asked for, DeepSpeed (`models.train.zero`). Not through accelerate, which in 1.15 shards on accelerators alone, so that
nothing could be tried without several of them. A process alone is the case of one, to which all of this is nothing.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from models.streaming.team import SOLO, Team
from models.train.examples import Examples
from models.train.packing import Batch, Row, batch_of, micro_batches
from models.train.zero import Part, Zero
from squeeze.steps.sharding import ZERO_STAGES, Way
from squeeze.steps.training import Train

REPLICAS = 2  # that hybrid sharding keeps of everything


@dataclass(frozen=True)
class Processes:
    """way: how weights are held, where there are several. at_once: all load the model at the same time."""

    team: Team = SOLO
    way: Way = "ddp"
    at_once: bool = True
    _mesh: DeviceMesh | None = field(default=None, init=False, repr=False, compare=False)
    _zero: list[Zero] = field(default_factory=list, init=False, repr=False, compare=False)  # of what was shared last

    def __post_init__(self) -> None:
        if self.sharded and self.way not in ZERO_STAGES:
            groups = (REPLICAS, self.size // REPLICAS) if self.way == "hybrid" else (self.size,)
            names = ("replicas", "parts") if self.way == "hybrid" else ("parts",)
            mesh = init_device_mesh(self.team.device.type, groups, mesh_dim_names=names)
            object.__setattr__(self, "_mesh", mesh)

    @property
    def size(self) -> int:
        return self.team.size

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a part of the weights."""
        return self.size > 1 and self.way not in ("ddp", "zero1", "zero2")

    @property
    def zero(self) -> Zero | None:
        """What DeepSpeed made of the model that was shared last."""
        return self._zero[0] if self._zero else None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, this one may hold a whole model in host memory."""
        turns = 1 if self.at_once else self.size
        for turn in range(turns):
            if turn == (0 if self.at_once else self.team.rank):
                yield
            self.team.sum(torch.zeros(1))

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Within, the leader is done before the others begin, who find on disk what it left there."""
        if not self.team.leads:
            self.team.sum(torch.zeros(1))
        yield
        if self.team.leads:
            self.team.sum(torch.zeros(1))

    def shard(self, model: Any, blocks: Sequence[nn.Module], step: Train, precision: str) -> None:
        """Leaves this process its part of the weights, in place; a block is put together while it is at work.

        model: in host memory where parts of weights are held, the same on every process.
        """
        if self.size > 1 and self.way in ZERO_STAGES:
            learns = any(one.requires_grad for one in model.parameters())
            self._zero[:] = (
                [Zero(self.team, self.way, model, blocks, step, precision)] if learns or self.sharded else []
            )
        if not self.sharded or self.way in ZERO_STAGES:
            return
        policy = OffloadPolicy()
        if self.way == "offload":
            policy = CPUOffloadPolicy(pin_memory=self.team.device.type == "cuda")
        for module in (*blocks, model):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True, offload_policy=policy)

    def called(self, model: Any) -> Any:
        """What to call for a loss whose gradient all processes share; its average, whatever each one's share of it."""
        if self.zero is not None:
            return self.zero
        if self.size == 1 or self.sharded:
            return model
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def adding_up(self, called: Any, *, last: bool) -> AbstractContextManager[Any]:
        """Within, a part of a batch goes through what `called` gave. last: of this batch.

        Whole gradients wait for the last part; parts of them are exchanged each time, which keeps memory low.
        """
        if isinstance(called, Zero):
            called.adding_up(last=last)
        return called.no_sync() if isinstance(called, DistributedDataParallel) and not last else nullcontext()

    def average(self, module: nn.Module | None) -> None:
        """Makes the gradients of what stands beside what `called` gave the average of everybody's, in place; all have
        the module, and a gradient of each of its parameters.
        """
        if module is None or self.size == 1:
            return
        for parameter in module.parameters():
            assert parameter.grad is not None, "all of it was called"
            self.team.sum(parameter.grad)
            parameter.grad /= self.size

    def batches(self, examples: Examples, rows: Sequence[Row], size: int | None) -> list[Batch]:
        """This process's share of some sequences, `size` of them together.

        Everybody gets as many batches, since whoever holds a part of the weights is needed by the others: one that has
        too few repeats a sequence that doesn't count.
        """
        most = math.ceil(len(rows) / self.size)
        own = [batch_of(examples, some) for some in micro_batches(rows[self.team.rank :: self.size], size or most)]
        missing = math.ceil(most / (size or most)) - len(own)
        return own + [batch_of(examples, rows[:1]).idle] * missing

    def total(self, *values: float) -> list[float]:
        """The sums of everybody's, float64."""
        if self.size == 1:
            return [*values]
        sums = torch.tensor(values, dtype=torch.float64)
        self.team.sum(sums)
        return sums.tolist()

    def sum(self, tensor: Tensor) -> None:
        """Makes it the sum of everybody's, in place."""
        self.team.sum(tensor)

    def agree(self, asked: threading.Event) -> bool:
        """Whether any of them is asked to end; then all are."""
        if self.total(asked.is_set())[0]:
            asked.set()
        return asked.is_set()

    def leader_says(self, value: bool) -> bool:
        return self.total(value and self.team.leads)[0] > 0

    def draw(self, seed: int, step: int) -> None:
        """Gives the others random numbers of their own for a step of the optimizer; the leader's go on as in a process
        alone, and are in its checkpoints.
        """
        if not self.team.leads:
            digest = hashlib.sha256(f"{seed} {step} {self.team.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def spread(self, tensors: Mapping[str, Tensor], like: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Whole tensors of a checkpoint as this process holds them: those of a parameter, and those of the optimizer
        that have its shape, as the parameter is. like: what learns, in the optimizer's order.
        """
        if self.zero is not None:
            return self.zero.spread(tensors)
        numbered = [*like.values()]
        held = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parameter = like.get(rest)
            if kind == "optimizer":
                parameter = numbered[int(rest.partition(".")[0])]
            held[name] = tensor if parameter is None else _as(parameter, tensor)
        return held

    def gather(self, model: nn.Module, each: Callable[[Tensor], Tensor], *, entire: bool) -> None:
        """Makes the leader's model one of whole tensors in host memory, which can be written but not called.

        each: what becomes of one, float32 where it learned. entire: all weights; else those alone that learned.
        """
        if self.sharded:
            self._gather(model, each, entire=entire)
        self.let_go()

    def let_go(self) -> None:
        """Of the model that was shared last, which is not called any more."""
        for zero in self._zero:
            zero.end()
        self._zero.clear()

    def _gather(self, model: nn.Module, each: Callable[[Tensor], Tensor], *, entire: bool) -> None:
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with what they were made of, so that ids stay taken
        for module in model.modules():
            for name, held in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if not (entire or held.requires_grad):
                    continue
                if id(held) not in made:
                    with self._whole(held) as tensor:
                        made[id(held)] = (
                            held,
                            nn.Parameter(each(tensor.cpu()), held.requires_grad) if self.team.leads else held,
                        )
                setattr(module, name, made[id(held)][1])

    def _whole(self, parameter: nn.Parameter) -> AbstractContextManager[Tensor]:
        return self.zero.whole(parameter) if self.zero is not None else nullcontext(whole(parameter.detach()))


ALONE = Processes()


def whole(tensor: Tensor | Part) -> Tensor:
    """Of which this process may hold a part; then all of them have to ask."""
    if isinstance(tensor, Part):
        return tensor.whole()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor, in memory of its own."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
    return DTensor.from_local(
        part.to(parameter.device, copy=True),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
