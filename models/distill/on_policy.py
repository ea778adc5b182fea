"""Distillation on text that the student writes itself (arXiv 2306.13649, section 3)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.distill.divergence import diverged
from models.distill.teaching import Taught, Teaching
from models.distill.writing import gone_on
from models.train.examples import Examples
from models.train.packing import UNSCORED, Batch
from models.train.scoring import learned_logits, learned_losses, own
from squeeze.steps.distillation import OnPolicy


def distill(step: OnPolicy, teaching: Teaching) -> Taught:
    """With the teacher beside the student."""
    return Taught(OfItsOwn(step, teaching))


class OfItsOwn:
    """The objective. In which batches the student writes is drawn from seed and step, and what it writes from the
    example's number too: neither depends on how many processes share a batch, nor on how it is cut.
    """

    def __init__(self, step: OnPolicy, teaching: Teaching) -> None:
        self._step, self._teaching, self._teacher = step, teaching, teaching.load()
        self._turn = (0, 0)

    def turn_to(self, seed: int, step: int) -> None:
        """Where the training is."""
        self._turn = (seed, step)

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        """Of each token that was compared; then the cross-entropy of each learned token, where it has a share. What was
        written counts with its mean (as in the paper), as often as its example has learned tokens.
        """
        step, written = self._step, None
        if float(_drawn(1, *self._turn)) < step.own_share:
            written = self._own(model, batch)
        if written is None:
            found = self._compared(model, batch, packed=packed)
        else:
            found = self._compared(model, written[0], packed=False) * written[1]
        found = step.alpha * step.temperature**2 * found
        if step.alpha == 1:
            return found
        return torch.cat([found, (1 - step.alpha) * learned_losses(model, batch, packed=packed)])

    def _compared(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        step, vocabulary = self._step, self._teaching.vocabulary
        with torch.no_grad():
            told = learned_logits(self._teacher, batch, packed=packed)
        said = learned_logits(model, batch, packed=packed)
        p, q = ((one[:, :vocabulary].float() / step.temperature).log_softmax(-1) for one in (told, said))
        return diverged(p, q, step.objective, step.beta)

    def _own(self, model: Any, batch: Batch) -> tuple[Batch, Tensor] | None:
        """What the student writes after the prompts of a batch's examples, and the weight of each token that it wrote,
        (n,); None where the batch has no examples.
        """
        examples, step = self._teaching.examples, self._step
        owners, counts = torch.unique(batch.owners[batch.targets != UNSCORED], return_counts=True)
        numbers = owners.tolist()
        if not numbers:
            return None
        longest = self._teaching.student.max_positions
        room = step.new_tokens if longest is None else min(step.new_tokens, longest // 2)
        prompts = [
            _prompt(examples, number, step.prompt_tokens, None if longest is None else longest - room)
            for number in numbers
        ]
        drawn = torch.stack([_drawn(room, *self._turn, number) for number in numbers])
        ends = [one for one in self._teaching.ends if one < self._teaching.vocabulary]
        written = gone_on(own(model), prompts, room, 1.0, ends, self._teaching.vocabulary, drawn)
        lengths = torch.tensor([len(one) for one in written], device=counts.device)
        weights = (counts / lengths).float().repeat_interleave(lengths)
        return _side_by_side([*zip(prompts, written, strict=True)]).to(batch.ids.device), weights


def _prompt(examples: Examples, number: int, tokens: int, most: int | None) -> Tensor:
    """What stands before the first learned token of an example; of one that is learned whole, so many tokens. most:
    tokens that it may have, the last ones; None: any number.
    """
    ids, scored = examples.one(number)
    first = int(scored.nonzero()[0, 0])
    prompt = ids[: first if first > 1 else min(tokens, len(ids) - 1)].long()
    return prompt if most is None else prompt[-most:]


def _drawn(count: int, *of: int) -> Tensor:
    """(count,) float64 from [0, 1), the same for the same numbers."""
    digest = hashlib.sha256(" ".join(map(str, of)).encode()).digest()
    dice = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=dice, dtype=torch.float64)


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """One sequence for each (prompt, what was written), of which the latter is learned."""
    whole = [torch.cat(pair) for pair in pairs]
    ids = pad_sequence(whole, batch_first=True)
    targets = torch.full_like(ids, UNSCORED)
    owners = torch.full_like(ids, -1)
    for row, (before, after) in enumerate(pairs):
        targets[row, len(before) - 1 : len(before) + len(after) - 1] = after
        owners[row, : len(before) + len(after)] = row
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return Batch(ids, positions, targets, owners)
