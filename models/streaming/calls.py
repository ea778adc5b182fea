"""How every block of a model is called: hidden states come and go batch by batch, the rest of the call is kept."""

from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from models.streaming.frame import Call, Frame
from models.streaming.streams import Stream
from models.streaming.team import SOLO, Team

TOKENS_PER_BATCH = 4096
TOKENS_PER_BATCH_CPU = 1024  # what lies between two products then stays in the cache: a tenth quicker than 4096
PROBE_TOKENS = 8  # go through a block to find out how it is made

Batch = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


class Calls:
    """How each block is called for each shape of batch: masks, positions, rotary tables.

    team: among whose processes the batches are dealt out.
    """

    def __init__(self, frame: Frame, streams: Sequence[Tensor], team: Team = SOLO) -> None:
        self.frame, self.team = frame, team
        self._by_shape: dict[tuple[int, ...], list[Call]] = {}
        # Without streams too: what lies around the blocks is read once, so that damage in it shows.
        with frame.surroundings(), torch.no_grad():
            for ids in streams:
                probe = ids[:1, :PROBE_TOKENS]
                for batch in {part.shape: part for part in (probe, *_batches(ids, frame.device, team.size))}.values():
                    self._by_shape[tuple(batch.shape)] = frame.enter(batch)[1]

    def enter(self, ids: Tensor | None) -> Iterator[Tensor]:
        """The first block's hidden states for every batch of ids that is this process's, on the host.

        Whole batches are dealt out, so that what comes of each is what a single process would get, to the bit; the last
        ones are the leader's, which has the last word on what is summed over all.
        """
        if ids is not None:
            with self.frame.surroundings(), torch.no_grad():
                for batch in self._own(_batches(ids, self.frame.device, self.team.size)):
                    yield self.frame.enter(batch)[0].cpu()

    def _own(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        size, turn = self.team.size, self.team.size - 1 - self.team.rank
        return batches[turn * len(batches) // size : (turn + 1) * len(batches) // size]

    def batch(self, index: int, hidden: Tensor) -> Batch:
        """What block `index` is called with for these hidden states (B, T, C), on the device."""
        shape = tuple(hidden.shape[:2])
        if shape not in self._by_shape:  # which tokens they are makes no difference to the call
            with self.frame.surroundings(), torch.no_grad():
                self._by_shape[shape] = self.frame.enter(torch.zeros(shape, dtype=torch.int64))[1]
        args, kwargs = self._by_shape[shape][index]
        return hidden.to(self.frame.device), args, kwargs

    def forward(self, index: int, module: nn.Module, stream: Stream) -> None:
        """Moves a stream behind a loaded block."""
        for number in range(len(stream)):
            stream.replace(number, run(module, self.batch(index, stream[number])).cpu())


class Batches(Sequence[Batch]):
    """A stream as calls of one block, each made when it is asked for."""

    def __init__(self, calls: Calls, index: int, stream: Stream) -> None:
        self._calls, self._index, self._stream = calls, index, stream

    def __len__(self) -> int:
        return len(self._stream)

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return self._calls.batch(self._index, self._stream[number])

    def rows(self, number: int, rows: Tensor) -> Batch:
        """Some sequences of a batch. rows: their places in it, int64."""
        return self._calls.batch(self._index, self._stream[number][rows])

    @property
    def tokens(self) -> int:
        """In all batches together."""
        return sum(shape[0] * shape[1] for shape in self._stream.shapes)

    def probe(self) -> Batch:
        """A few tokens of the first batch; for all processes of a team of the very first one."""
        team = self._calls.team
        few = {"": self._stream[0][:1, :PROBE_TOKENS].contiguous()}
        return self._calls.batch(self._index, team.tensors(few, team.size - 1)[""])


def run(module: nn.Module, batch: Batch) -> Tensor:
    """A block's hidden states for one batch, (B, T, C)."""
    hidden, args, kwargs = batch
    output = module(hidden, *args, **kwargs)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def held_bytes(module: nn.Module, probe: Batch) -> int:
    """What the parts of a block put out for a batch, all together: no less than what they hold at any time."""
    total = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    handles = [one.register_forward_hook(count) for one in module.modules() if not list(one.children())]
    try:
        run(module, probe)
    finally:
        for handle in handles:
            handle.remove()
    return total


def _batches(ids: Tensor, device: torch.device, parts: int) -> tuple[Tensor, ...]:
    """No fewer than `parts`, if there are as many sequences."""
    tokens = TOKENS_PER_BATCH_CPU if device.type == "cpu" else TOKENS_PER_BATCH
    return torch.split(ids, max(1, min(tokens // ids.shape[1], len(ids) // parts)))
