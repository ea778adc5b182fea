"""The processes of one host that share one step of a job: what they say to each other, and how that can fail.

Each has a rank; rank 0 leads. Tensors are summed over all or handed out by one, everything else goes as JSON. All of
them call the same operations in the same order; `meet` makes sure that they do. Tensors of the host go through gloo,
those of a GPU through NCCL, both on the loopback interface. A process alone is a team of one, to which every
operation is nothing.

Whoever waits for a process that has ended is told so at once by gloo; NCCL is not told, so what starts the processes
(torchrun, or a job's first process) ends all when one ends. One that lives and does not answer is given up after
ANSWER_SECONDS.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from squeeze.errors import ProcessKilled

ANSWER_SECONDS = 1800.0  # a linear may take its solver minutes, while the others wait
BEGIN_SECONDS = 24 * 3600.0  # until the leader has a model and text: they may come from afar
BEGUN = "begun"
LOOPBACK = "lo"


class Team:
    """One process's place among those that share the work.

    rank: of this one, size: how many there are. store: where they find each other; None: there is but one. device:
    where this one computes.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: Store | None = None,
        device: torch.device | None = None,
        *,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")
        self._store, self._answer, self._met = store, timedelta(seconds=answer_seconds), 0

    @classmethod
    def meeting_at(
        cls, file: Path, rank: int, size: int, device: str, answer_seconds: float = ANSWER_SECONDS
    ) -> "Team":
        """Of processes that find each other by a file, which none of an earlier team may have used."""
        if size == 1:
            return SOLO
        store = dist.FileStore(str(file), size)  # type: ignore[attr-defined]
        return cls(rank, size, store, torch.device(device), answer_seconds=answer_seconds)

    @classmethod
    def of_environment(cls, device: str) -> "Team":
        """As torchrun says it (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); alone where it says nothing.

        device: `cpu`, or `cuda`, of which each takes the one with its local rank.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return SOLO
        rank = int(os.environ["RANK"])
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=BEGIN_SECONDS)))
        own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
        return cls(rank, size, store, own)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Meanwhile all are connected. The others wait here until the leader comes. They may come together again.

        After an error nothing is undone, for that might wait for a process that no longer answers: this one has to end.
        """
        if self._store is None:
            yield
            return
        self._met += 1
        store = PrefixStore(str(self._met), self._store)
        if self.leads:
            store.set(BEGUN, "")
        else:
            store.wait([BEGUN], timedelta(seconds=BEGIN_SECONDS))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        with self._answered():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=self._answer,
                device_id=self.device if on_gpu else None,
            )
        yield
        dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> None:
        """Makes it the sum of everybody's, in place. The order of the sum is the same on every run."""
        self._in_place(tensor, dist.all_reduce)

    def largest(self, tensor: Tensor) -> None:
        """Makes each number the largest of everybody's, in place."""
        self._in_place(tensor, lambda whole: dist.all_reduce(whole, dist.ReduceOp.MAX))

    @contextmanager
    def in_turn(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within, the tensors hold what the process before this one left in its own. The leader comes last.

        tensors: contiguous, the first one's as they shall begin.
        """
        if self.rank + 1 < self.size:
            for tensor in tensors:
                with self._answered():
                    dist.recv(tensor, self.rank + 1)
        yield
        if self.rank > 0:
            for tensor in tensors:
                with self._answered():
                    dist.send(tensor, self.rank - 1)

    def share(self, tensor: Tensor, source: int = 0) -> None:
        """Makes it that of one process, bit for bit, in place."""
        self._in_place(tensor, lambda whole: dist.broadcast(whole.view(-1).view(torch.uint8), source))

    def share_weights(self, module: nn.Module) -> None:
        """Makes all parameters of a module those of the leader."""
        for parameter in module.parameters():
            self.share(parameter.data)

    def tell(self, value: Any, source: int = 0) -> Any:
        """What one process tells the others, who give anything. value: JSON-able."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(text)])
        self.share(length, source)
        told = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            told.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.share(told, source)
        return json.loads(told.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """What each tells, by rank. value: JSON-able."""
        return [self.tell(value, source) for source in range(self.size)]

    def meet(self, place: str) -> None:
        """Makes sure that all are at the same place in the work."""
        leaders = self.tell(place)
        if leaders != place:
            raise RuntimeError(f"process {self.rank} of {self.size} is at {place}, the first one at {leaders}")

    def tensors(self, named: Mapping[str, Tensor], source: int = 0) -> dict[str, Tensor]:
        """The tensors of one process, which the others get, on the host or their own GPU, whatever they give."""
        if self.size == 1:
            return dict(named)
        own = self.rank == source
        about = [
            [name, str(one.dtype).removeprefix("torch."), list(one.shape), one.device.type == "cpu"]
            for name, one in named.items()
        ]
        held = {}
        for name, dtype, shape, on_host in self.tell(about, source):
            device = torch.device("cpu") if on_host else self.device
            held[name] = named[name] if own else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self.share(held[name], source)
        return held

    def _in_place(self, tensor: Tensor, operation: Callable[[Tensor], object]) -> None:
        if self.size == 1 or not tensor.numel():
            return
        whole = tensor.contiguous()
        with self._answered():
            operation(whole)
        if whole is not tensor:
            tensor.copy_(whole)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Says in our words that another process did not answer; torch has no one class of errors for that."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ProcessKilled(
                f"One of the {self.size} processes that share this job ended, or did not answer within "
                f"{self._answer.total_seconds():g} seconds. Tried again, the job goes on from where it stopped."
            ) from error


SOLO = Team()
