"""Distillation from the teacher's hidden states (arXiv 1910.01108), or from how its attention relates tokens (arXiv
2012.15828), beside its next-token distributions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.distill.divergence import diverged
from models.distill.logits import mixed
from models.distill.teaching import Taught, Teaching
from models.streaming.frame import Frame
from models.train.packing import UNSCORED, Batch
from models.train.scoring import learned_logits
from models.train.scoring import own as own_model
from squeeze.errors import ArchitectureUnsupported
from squeeze.steps.distillation import RELATION_WIDTH, Hidden

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def distill(step: Hidden, teaching: Teaching) -> Taught:
    """With the teacher beside the student."""
    if step.match == "relations":
        return Taught(Relations(step, teaching))
    widths = [int(one.model.config.get_text_config().hidden_size) for one in (teaching.student, teaching.frame)]
    pairs = mapped(teaching.student.count, teaching.frame.count)
    across = None
    if widths[0] != widths[1]:
        across = nn.ModuleList([_across(widths[0], widths[1], n) for n in range(len(pairs))]).to(teaching.frame.device)
    return Taught(States(step, teaching, pairs, across), beside=across)


def mapped(student: int, teacher: int) -> list[tuple[int, int]]:
    """(a block of the student, the teacher's that it learns from) for blocks so many: at the same share of the depth,
    the last from the last. A student that is deeper learns with some of its blocks.
    """
    if student <= teacher:
        return [(n, (n + 1) * teacher // student - 1) for n in range(student)]
    return [(own, other) for other, own in mapped(teacher, student)]


class _Both:
    """The objective without what is matched: the distributions of the teacher, which reads every batch."""

    def __init__(self, step: Hidden, teaching: Teaching) -> None:
        self._step, self._vocabulary, self._teacher = step, teaching.vocabulary, teaching.load()

    def _loss(self, said: Tensor, told: Tensor, batch: Batch) -> Tensor:
        """said, told: logits of student and teacher, (n, V)."""
        step = self._step
        p, q = ((one[:, : self._vocabulary].float() / step.temperature).log_softmax(-1) for one in (told, said))
        return mixed(step, diverged(p, q, step.objective, step.beta), said, batch)


class States(_Both):
    """pairs: of blocks. across: from the student's width to the teacher's, one for each pair."""

    def __init__(
        self, step: Hidden, teaching: Teaching, pairs: list[tuple[int, int]], across: nn.ModuleList | None
    ) -> None:
        super().__init__(step, teaching)
        self._pairs, self._across = pairs, across
        self._paths = teaching.student.blocks_path, teaching.frame.blocks_path

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        learned = batch.targets != UNSCORED
        with torch.no_grad(), _seen(self._teacher, self._paths[1], [other for _, other in self._pairs]) as theirs:
            told = learned_logits(self._teacher, batch, packed=packed)
        with _seen(own_model(model), self._paths[0], [own for own, _ in self._pairs]) as ours:
            said = learned_logits(model, batch, packed=packed)
        apart = torch.zeros(int(learned.sum()), device=said.device)
        for n, (own, other) in enumerate(self._pairs):
            student = ours[own][learned]  # (B, T, C) -> (n, C)
            if self._across is not None:
                student = self._across[n](student)
            apart = apart + _far(student.float(), theirs[other][learned].float(), self._step.match)
        return self._loss(said, told, batch) + self._step.weight * apart / len(self._pairs)


class Relations(_Both):
    """Of the last block's queries, keys and values, before they are rotated."""

    def __init__(self, step: Hidden, teaching: Teaching) -> None:
        self._names = tuple(_projections(one) for one in (teaching.student, teaching.frame))
        super().__init__(step, teaching)

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        with torch.no_grad(), _put_out(self._teacher, self._names[1]) as theirs:
            told = learned_logits(self._teacher, batch, packed=packed)
        with _put_out(own_model(model), self._names[0]) as ours:
            said = learned_logits(model, batch, packed=packed)
        learned, apart = batch.targets != UNSCORED, torch.zeros(batch.learned, device=said.device)
        for own, other in zip(ours, theirs, strict=True):
            shared = math.gcd(own.shape[-1], other.shape[-1])
            heads = shared // RELATION_WIDTH if shared % RELATION_WIDTH == 0 else 1
            p, q = (_related(one.float(), heads, batch) for one in (other, own))
            apart = apart + diverged(p, q, "forward_kl", 0.5).mean(1)[learned]  # (B, A, T) -> (n,)
        return self._loss(said, told, batch) + self._step.weight * apart


def _far(student: Tensor, teacher: Tensor, match: str) -> Tensor:
    """Of each row, (n,)."""
    if match == "cosine":
        return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def _related(states: Tensor, heads: int, batch: Batch) -> Tensor:
    """Log-probabilities with which each token relates to those before it in its example, (B, A, T, T)."""
    count, length, width = states.shape
    split = states.view(count, length, heads, width // heads).transpose(1, 2)  # (B, T, A·D) -> (B, A, T, D)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    near = (batch.owners[:, :, None] == batch.owners[:, None, :]).tril()[:, None]
    # Not -inf: what both rule out is then nothing times nothing in the divergence.
    return scores.masked_fill(~near, torch.finfo(scores.dtype).min / 2).log_softmax(-1)


def _across(student: int, teacher: int, number: int) -> nn.Linear:
    """From one width to the other, the same from the same number."""
    made = nn.Linear(student, teacher, bias=False)
    with torch.no_grad():
        dice = torch.Generator().manual_seed(number)
        made.weight.copy_(torch.randn(teacher, student, generator=dice) / math.sqrt(student))
    return made


@contextmanager
def _seen(model: Any, path: str, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What these blocks put out meanwhile, (B, T, C) each."""
    found: dict[int, Tensor] = {}

    def note(number: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    all_blocks = model.get_submodule(path)
    handles = [all_blocks[number].register_forward_hook(note(number)) for number in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _put_out(model: Any, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """What these modules put out meanwhile, in their order in `names`."""
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output)) for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _projections(frame: Frame) -> list[str]:
    """Names of the last block's projections; raises where attention has none of its own for each."""
    last = frame.count - 1
    names = {name.rpartition(".")[2]: name for name, _ in frame.skeleton(last).named_modules()}
    if any(name not in names for name in PROJECTIONS):
        raise ArchitectureUnsupported(
            f"attention of a {frame.model.config.model_type} has no projections of its own for queries, keys and "
            "values, whose relations could be compared: take match `mse` or `cosine`",
            param="match",
        )
    return [f"{frame.blocks_path}.{last}.{names[name]}" for name in PROJECTIONS]
