"""Distillation from the teacher's next-token distributions on the text (arXiv 1503.02531, 2306.08543, 2306.13649)."""

from typing import Any

import torch
from torch import Tensor

from models.distill.divergence import diverged, in_buckets
from models.distill.stored import Shape, Stored, asked
from models.distill.teaching import Taught, Teaching
from models.train.packing import Batch
from models.train.scoring import against_text, learned_logits
from squeeze.steps.distillation import Diverging, Logits


def distill(step: Logits, teaching: Teaching) -> Taught:
    """With `top_k` of what is kept on disk, else of the teacher beside the student."""
    if step.top_k == "all":
        return Taught(BesideTheTeacher(step, teaching.load(), teaching.vocabulary))
    learned = int(teaching.examples.scored.sum())
    shape = Shape(learned, min(step.top_k, teaching.vocabulary - 1), teaching.vocabulary)
    directory = teaching.directory / "says"
    stored = asked(
        teaching.frame,
        teaching.examples,
        shape,
        step.temperature,
        directory,
        teaching.mark,
        teaching.notify,
        teaching.memory_bytes,
        teaching.read,
    )
    return Taught(FromStored(step, stored), bytes_per_token=shape.bytes_per_token)


class FromStored:
    """The objective where what the teacher says is kept: a divergence of `top_k` + 1 outcomes."""

    def __init__(self, step: Logits, stored: Stored) -> None:
        self._step, self._stored = step, stored

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        step, logits = self._step, learned_logits(model, batch, packed=packed).float()  # (n, V)
        ids, p = self._stored.of(batch)
        q = in_buckets(logits[:, : self._stored.shape.vocabulary] / step.temperature, ids)
        return mixed(step, diverged(p, q, step.objective, step.beta), logits, batch)


class BesideTheTeacher:
    """The objective where the teacher reads every batch: a divergence over the whole vocabulary."""

    def __init__(self, step: Logits, teacher: Any, vocabulary: int) -> None:
        self._step, self._teacher, self._vocabulary = step, teacher, vocabulary

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        step, logits = self._step, learned_logits(model, batch, packed=packed).float()  # (n, V)
        with torch.no_grad():
            told = learned_logits(self._teacher, batch, packed=packed).float()
        p, q = ((one[:, : self._vocabulary] / step.temperature).log_softmax(-1) for one in (told, logits))
        return mixed(step, diverged(p, q, step.objective, step.beta), logits, batch)


def mixed(step: Diverging, divergence: Tensor, logits: Tensor, batch: Batch) -> Tensor:
    """The loss of each learned token, (n,): gradients of a divergence shrink with the square of the temperature."""
    loss = step.alpha * step.temperature**2 * divergence
    return loss + (1 - step.alpha) * against_text(logits, batch) if step.alpha < 1 else loss
