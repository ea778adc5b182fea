"""What a text's loss would change by without a neuron, a group of heads or a channel, to first order.

Gradients go back through the whole model with one block in memory at a time: what each block was given is kept on disk
on the way forwards, and on the way back each block runs again to be gone back through. Where the way is is kept from
time to time, so that another attempt goes on from there, to the same bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.measuring.evaluation import LOGIT_BYTES
from models.prune.slimming.looking import Looked, Looking
from models.resources import available_host_bytes, return_free_memory
from models.streaming.calls import Calls, run
from models.streaming.frame import Frame
from models.streaming.snapshots import SNAPSHOT_SHARE
from models.streaming.streams import Room, Stream
from models.streaming.walk import Kept
from squeeze.errors import NotFinite
from squeeze.shapes.widths import axes_of, widths_of

NEURONS, GROUPS, CHANNELS = "taylor_neurons", "taylor_groups", "taylor_channels"
STATES, SUMS = "states", "sums"


class Taylor:
    """Adds up |w · ∂L/∂w| of all weights that go with each neuron, each group of heads and each channel.

    L: negative log-likelihood of the whole text, nats. Source: arXiv 2305.11627 §3.2, eq. 5 (element-wise, first
    order). Differs: groups of heads that share keys and values are judged whole; a head and an embedding that are one
    tensor are judged as two.
    sums, float64: taylor_neurons (blocks, inner); taylor_groups (blocks, groups); taylor_channels (hidden,).
    """

    def __init__(self, frame: Frame) -> None:
        self._widths = widths = widths_of(frame.source.config, frame.sides())
        sides = {NEURONS: (frame.count, widths.inner), GROUPS: (frame.count, widths.groups), CHANNELS: (widths.hidden,)}
        self.sums = {name: torch.zeros(each, dtype=torch.float64) for name, each in sides.items()}

    @contextmanager
    def of(self, module: nn.Module, index: int) -> Iterator[Callable[[], None]]:
        """Meanwhile, the weights of a loaded block, or of what lies around the blocks (-1), learn. Gives what puts the
        gradients so far aside: sums of many are in float32.
        """
        weights = {name: one for name, one in module.named_parameters() if not one.is_meta}
        gradients = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in weights.items()}
        for one in weights.values():
            one.requires_grad_(True)

        def aside() -> None:
            for name, one in weights.items():
                if one.grad is not None:
                    gradients[name] += one.grad
                    one.grad = None

        yield aside
        for name, one in weights.items():
            one.requires_grad_(False)
            self._add(name, index, gradients.pop(name).mul_(one.detach()).abs_())

    def _add(self, name: str, index: int, changes: Tensor) -> None:
        """changes: of a tensor's elements."""
        for dimension, axis in enumerate(axes_of(name)):
            if axis is None:
                continue
            others = [other for other in range(changes.ndim) if other != dimension]
            own = (changes.sum(others) if others else changes).double().cpu()
            if axis == "hidden":
                self.sums[CHANNELS] += own
            elif axis == "inner":
                self.sums[NEURONS][index] += own
            else:
                self.sums[GROUPS][index] += own.view(self._widths.groups, -1).sum(dim=-1)


def looked(looking: Looking) -> Looked:
    """Sums of a `Taylor`. looking: without windows."""
    frame, notify, ids = looking.frame, looking.notify, looking.ids
    way = _Way(looking)
    if way.done == way.whole:
        return Looked(way.taylor.sums, None)
    if way.done:
        notify.event("info", f"going on after {way.done} of {way.whole} steps, which an earlier attempt finished")
    calls = Calls(frame, [ids])
    while way.done < way.whole:
        step = way.done
        if step == 0:
            way.states = Stream(way.room, calls.enter(ids))
        elif step <= frame.count:
            way.before.append(Stream(way.drawer, way.states))
            with frame.block(step - 1) as block, torch.no_grad():
                calls.forward(step - 1, block, way.states)
        elif step == frame.count + 1:
            _back_from_head(frame, ids, way.states, way.taylor)
        elif step < way.whole - 1:
            _back_through(calls, way.whole - 2 - step, way.before.pop(), way.states, way.taylor)
        else:
            _back_to_embedding(frame, ids, way.states, way.taylor)
        return_free_memory()
        way.step()
        notify.advance(way.done, way.whole, "steps forwards and back")
    return Looked(way.taylor.sums, None)


class _Way:
    """Where it is: the embedding, so many blocks, the head, so many blocks back, and the embedding again.

    before: what each block was given, that it has not been gone back through. states: hidden states, or gradients.
    """

    def __init__(self, looking: Looking) -> None:
        self._kept, self._count = Kept(looking.directory, looking.mark), looking.frame.count
        limit = available_host_bytes() // 2 if looking.memory_bytes is None else looking.memory_bytes
        self.room = Room(limit, looking.directory / "activations")
        self.drawer = Room(
            0, looking.directory / "before"
        )  # all on disk, since there are more of them with every block
        self.taylor, self.whole = Taylor(looking.frame), 2 * self._count + 3
        self.before: list[Stream] = []
        self.states = Stream(self.room)
        self.done = self._kept.last() or 0
        if self.done:
            self.taylor.sums.update(self._kept.sums(self.done, SUMS))
        if 0 < self.done < self.whole:
            self.states = self._kept.streams(self.done, self.room, [STATES])[STATES]
            names = [_given(number) for number in range(self._behind)]
            self.before = list(self._kept.streams(self.done, self.drawer, names).values())
        self._seconds, self._saved_at, self._cost = looking.snapshot_seconds, time.monotonic(), 0.0

    def step(self) -> None:
        """One more is behind."""
        self.done += 1
        now = time.monotonic()
        if self.done == self.whole:
            self.states.clear()
            self._kept.save(self.done, {}, {SUMS: self.taylor.sums})
        elif now - self._saved_at >= min(self._seconds, self._cost / SNAPSHOT_SHARE):
            streams = {STATES: self.states} | {_given(number): one for number, one in enumerate(self.before)}
            self._kept.save(self.done, streams, {SUMS: self.taylor.sums})
            self._saved_at, self._cost = time.monotonic(), time.monotonic() - now

    @property
    def _behind(self) -> int:
        """Blocks that were gone through, and not back."""
        return min(self.done - 1, self._count) if self.done <= self._count + 2 else self.whole - 1 - self.done


def _given(number: int) -> str:
    return f"before-{number:05d}"


def _back_from_head(frame: Frame, ids: Tensor, states: Stream, taylor: Taylor) -> None:
    """Puts the gradients of the loss in the place of the last hidden states."""
    rows = max(16, LOGIT_BYTES // (4 * int(frame.model.config.vocab_size)))
    with frame.surroundings(), taylor.of(frame.model, -1) as aside, torch.enable_grad():
        for number, own in _batches(states, ids):
            hidden = states[number].to(frame.device)
            gradients = torch.zeros_like(hidden)
            for n in range(len(hidden)):
                for start in range(0, ids.shape[1] - 1, rows):
                    part = slice(start, min(start + rows, ids.shape[1] - 1))
                    given = hidden[n : n + 1, part].detach().requires_grad_()
                    logits = frame.leave(given, own[n : n + 1, part])[0].float()
                    targets = own[n, part.start + 1 : part.stop + 1].to(frame.device)
                    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                    if not loss.isfinite():
                        raise NotFinite(f"the loss of the calibration text is NaN or infinite in {frame.dtype}")
                    torch.autograd.backward(loss)
                    gradients[n, part] = cast(Tensor, given.grad)[0]
                    aside()
            states.replace(number, gradients.cpu())


def _back_through(calls: Calls, index: int, before: Stream, states: Stream, taylor: Taylor) -> None:
    """Moves gradients from behind a block to before it. before: what it was given."""
    with calls.frame.block(index) as block, taylor.of(block, index) as aside, torch.enable_grad():
        for number in range(len(states)):
            hidden, args, kwargs = calls.batch(index, before[number])
            given = hidden.detach().requires_grad_()
            # A block may work in place on what it is given, which a leaf can't bear.
            torch.autograd.backward(run(block, (given.clone(), args, kwargs)), states[number].to(calls.frame.device))
            states.replace(number, cast(Tensor, given.grad).cpu())
            aside()
    before.clear()


def _back_to_embedding(frame: Frame, ids: Tensor, states: Stream, taylor: Taylor) -> None:
    with frame.surroundings(), taylor.of(frame.model, -1) as aside, torch.enable_grad():
        for number, own in _batches(states, ids):
            torch.autograd.backward(frame.enter(own)[0], states[number].to(frame.device))
            aside()


def _batches(states: Stream, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of each batch, and its tokens (B, T)."""
    sizes: Sequence[int] = [shape[0] for shape in states.shapes]
    yield from enumerate(ids.split(list(sizes)))  # type: ignore[no-untyped-call]
