"""Distillation on text that the student writes itself (arXiv 2306.13649, section 3)."""

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
from squeeze.distillation import OnPolicy


def distill(step: OnPolicy, teaching: Teaching) -> Taught:
    """With the teacher beside the student."""
    return Taught(OfItsOwn(step, teaching))


class OfItsOwn:
    """The objective. torch's random numbers decide what the student writes, and in which batches it does; a training
    that goes on has them back.
    """

    def __init__(self, step: OnPolicy, teaching: Teaching) -> None:
        self._step, self._teaching, self._teacher = step, teaching, teaching.load()

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        """Of each token that was compared, so weighted that their sum over the batch's learned tokens is the mean; then
        the cross-entropy of each learned token, where it has a share.
        """
        step, learned = self._step, batch.learned
        mine = None
        if float(torch.rand(())) < step.own_share:
            mine = self._own(model, batch)
        if mine is None:
            found = self._compared(model, batch, packed=packed)
        else:
            found = self._compared(model, mine, packed=False)
            found = found * (learned / len(found))
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

    def _own(self, model: Any, batch: Batch) -> Batch | None:
        """What the student writes after the prompts of a batch's examples; None where it ends all of them at once."""
        examples, step = self._teaching.examples, self._step
        owners = sorted({one for one in batch.owners.flatten().tolist() if one >= 0})
        prompts = [prompt for one in owners if len(prompt := _prompt(examples, one, step.prompt_tokens))]
        if not prompts:
            return None
        longest = self._teaching.student.max_positions
        room = step.new_tokens if longest is None else min(step.new_tokens, longest - max(map(len, prompts)))
        if room < 1:
            return None
        ends = [one for one in self._teaching.ends if one < self._teaching.vocabulary]
        written = gone_on(own(model), prompts, room, 1.0, ends, self._teaching.vocabulary)
        pairs = [(before, after) for before, after in zip(prompts, written, strict=True) if len(after)]
        return _side_by_side(pairs).to(batch.ids.device) if pairs else None


def _prompt(examples: Examples, number: int, tokens: int) -> Tensor:
    """What stands before the first learned token of an example; of one that is learned whole, so many tokens."""
    ids, scored = examples.one(number)
    first = int(scored.nonzero()[0, 0])
    return ids[: first if first > 1 else min(tokens, len(ids) - 1)].long()


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
