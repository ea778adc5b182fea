"""The teacher as it reads text: one decoder block in memory at a time, whatever its size, as the engine does it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.progress import Notify
from models.resources import available_host_bytes, return_free_memory
from models.streaming.calls import TOKENS_PER_BATCH, TOKENS_PER_BATCH_CPU, run
from models.streaming.frame import Call, Frame
from models.streaming.streams import Room, Stream
from models.train.examples import Examples
from squeeze.costs.distillation_work import CHUNK_TOKENS

LOGIT_BYTES = 64 << 20  # of one float32 slice of logits
GRAIN = 16  # sequences are filled up to a multiple of so many tokens, so that there are few shapes of batches

# What a chunk gives: the places of its learned tokens among all learned ones, (n,) int64, and the last block's hidden
# states where they are predicted, (n, C).
Take = Callable[[Tensor, Tensor], None]


def chunks_of(examples: Examples) -> list[range]:
    """Numbers of the examples that go through the teacher together; the same on every machine."""
    lengths, found, start, tokens = examples.lengths, [], 0, 0
    for number, length in enumerate(lengths):
        if tokens and tokens + length > CHUNK_TOKENS:
            found.append(range(start, number))
            start, tokens = number, 0
        tokens += length
    return [*found, range(start, len(lengths))]


def places_of(examples: Examples) -> Tensor:
    """Of each token, which of the learned ones it is, (N,) int64; of those that aren't, which comes next."""
    return examples.scored.long().cumsum(0) - examples.scored.long()


@torch.no_grad()
def read_chunk(
    frame: Frame,
    examples: Examples,
    numbers: Sequence[int],
    take: Take,
    work: Path,
    notify: Notify,
    memory_bytes: int | None = None,
    told: tuple[int, int] | None = None,
) -> None:
    """Sends some examples through the teacher and hands over what stands before its final norm, batch by batch.

    take: is called with the frame's surroundings loaded, so that it may ask for logits. work: for activations beyond
    memory_bytes; None: half of what is free. told: tokens that were read before these, and in all; None: these are
    all. Each example is read by itself.
    """
    batches, tokens = _batches(examples, numbers, frame), sum(examples.lengths[number] for number in numbers)
    earlier, whole = told or (0, tokens)
    room = Room(available_host_bytes() // 2 if memory_bytes is None else memory_bytes, work / "activations")
    stream, calls = Stream(room), dict[tuple[int, int], list[Call]]()
    with frame.surroundings():
        for ids, _ in batches:
            hidden, calls[ids.shape[0], ids.shape[1]] = frame.enter(ids)
            stream.append(hidden.cpu())
    for index in range(frame.count):
        with frame.block(index) as block:
            for number, (ids, _) in enumerate(batches):
                args, kwargs = calls[ids.shape[0], ids.shape[1]][index]
                stream.replace(number, run(block, (stream[number].to(frame.device), args, kwargs)).cpu())
        return_free_memory()
        notify.advance(earlier + tokens * (index + 1) // frame.count, whole, "tokens")
    places = places_of(examples)
    with frame.surroundings():
        for number, (_, members) in enumerate(batches):
            where = [examples.one(member)[1].nonzero()[:, 0] for member in members]
            own = [places[examples.starts[member] + some] for member, some in zip(members, where, strict=True)]
            last = stream[number]
            before = [last[row, some - 1] for row, some in enumerate(where)]
            take(torch.cat(own), torch.cat(before))
    stream.clear()


def logits_in_slices(frame: Frame, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The teacher's logits of hidden states (n, C), a slice of them at a time: (rows, (r, V) float32 on the device).

    Needs the frame's surroundings.
    """
    rows = max(GRAIN, LOGIT_BYTES // (4 * int(frame.model.config.vocab_size)))
    rows = min(rows, frame.max_positions or rows)
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        ids = torch.zeros((1, part.stop - part.start), dtype=torch.int64)
        yield part, frame.leave(hidden[None, part], ids)[0].float()


def _batches(examples: Examples, numbers: Sequence[int], frame: Frame) -> list[tuple[Tensor, list[int]]]:
    """(ids (B, T) int64, numbers of their examples), examples of like lengths together.

    What fills a sequence up stands behind what is learned, where a causal model doesn't see it.
    """
    lengths = examples.lengths
    tokens = TOKENS_PER_BATCH_CPU if frame.device.type == "cpu" else TOKENS_PER_BATCH
    found: list[tuple[Tensor, list[int]]] = []
    left = sorted(numbers, key=lambda number: (-lengths[number], number))
    while left:
        longest = -(-lengths[left[0]] // GRAIN) * GRAIN
        longest = min(longest, frame.max_positions or longest)
        members = left[: max(1, tokens // longest)]
        ids = torch.zeros((len(members), longest), dtype=torch.int64)
        for row, member in enumerate(members):
            own = examples.one(member)[0]
            ids[row, : len(own)] = own
        found.append((ids, members))
        left = left[len(members) :]
    return found
