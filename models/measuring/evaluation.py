"""What was lost: perplexity, divergence and agreement, from the hidden states that both models' blocks left behind."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models.progress import Notify
from models.streaming.frame import Frame
from models.texts.data import Windows
from squeeze.errors import NotFinite
from squeeze.reports.parts import Quality

LOGIT_BYTES = 128 << 20  # of one float32 slice of logits; about six such slices live at once


@dataclass(frozen=True)
class Measured:
    """nll_after: mean negative log-likelihood of each window's scored tokens under the result, nats."""

    quality: Quality
    nll_after: list[float]


def measure(
    frame: Frame,
    windows: Windows,
    original: Iterable[Tensor],
    compressed: Iterable[Tensor],
    notify: Notify,
    reference: Frame | None = None,
) -> Measured:
    """Scores both models on the same tokens.

    original, compressed: last hidden states of all windows, as batches (B, T, C) in order. Perplexity is the
    exponential of the mean negative log-likelihood of the scored tokens; the divergence is the mean over the same
    positions of KL(original ‖ result), in nats, both in float32. Needs no model but the head; `reference` has the
    original's where that is another.
    """
    reference = reference or frame
    vocabulary = int(frame.model.config.vocab_size)
    rows = max(16, LOGIT_BYTES // (4 * vocabulary))
    window_nll: list[float] = []
    sums = torch.zeros(4, dtype=torch.float64)  # nll before, nll after, divergence, agreements
    pairs = (pair for batches in zip(original, compressed, strict=True) for pair in zip(*batches, strict=True))
    other = nullcontext() if reference is frame else reference.surroundings()
    with frame.surroundings(), other, torch.no_grad():
        for n, (first, (before, after)) in enumerate(zip(windows.first_scored, pairs, strict=True)):
            ids = windows.ids[n]
            own = torch.zeros(4, dtype=torch.float64)
            # The logits at position t predict token t + 1.
            for start in range(first - 1, len(ids) - 1, rows):
                part = slice(start, min(start + rows, len(ids) - 1))
                targets = ids[part.start + 1 : part.stop + 1].to(frame.device)
                own += _compare(
                    reference.leave(before[None, part], ids[None, part])[0],
                    frame.leave(after[None, part], ids[None, part])[0],
                    targets,
                )
            window_nll.append(float(own[1]) / (len(ids) - first))
            sums += own
            notify.advance(n + 1, len(windows.first_scored), "windows")
    if not torch.isfinite(sums).all():
        raise NotFinite(
            f"the logits are NaN or infinite in {frame.dtype}: the final norm or the output head is damaged, or does "
            "not fit that type"
        )
    means = (sums / windows.scored_tokens).tolist()
    length, stride = windows.ids.shape[1], windows.stride
    quality = Quality(
        text=windows.text,
        stride=stride,
        protocol=f"windows of {length} tokens every {stride}; the last {stride} of each are scored, "
        f"a window's very first token never; {frame.dtype} on {frame.device.type}".replace("torch.", ""),
        scored_tokens=windows.scored_tokens,
        perplexity_before=_perplexity(means[0]),
        perplexity_after=_perplexity(means[1]),
        divergence_nats=max(means[2], 0.0),
        top1_agreement=means[3],
    )
    return Measured(quality, window_nll)


def _compare(before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions. before, after: logits (t, V). targets: (t,). Returns (4,) float64 on the CPU."""
    p = torch.log_softmax(before.float(), dim=-1)
    q = torch.log_softmax(after.float(), dim=-1)
    chosen = targets.unsqueeze(-1)
    divergence = (p.exp() * (p - q)).sum(dtype=torch.float64)
    agreements = (p.argmax(dim=-1) == q.argmax(dim=-1)).sum()
    return torch.stack(
        [
            -p.gather(-1, chosen).sum(dtype=torch.float64),
            -q.gather(-1, chosen).sum(dtype=torch.float64),
            divergence,
            agreements.double(),
        ]
    ).cpu()


def _perplexity(nll: float) -> float:
    """At most some 10^304, so that it stays a number whatever the loss."""
    return math.exp(min(nll, 700.0))
