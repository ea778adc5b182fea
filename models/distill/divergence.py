"""How far a student's next-token distributions are from the teacher's."""

import math

import torch
from torch import Tensor

from squeeze.steps.distillation import Divergence


def diverged(p: Tensor, q: Tensor, kind: Divergence, beta: float) -> Tensor:
    """The divergence of each row, nats: (n,). p: the teacher's log-probabilities (n, m). q: the student's.

    forward_kl: Σ P (log P − log Q). reverse_kl: Σ Q (log Q − log P) (arXiv 2306.08543). jsd: the generalised
    Jensen–Shannon divergence β KL(P ‖ M) + (1 − β) KL(Q ‖ M), M = β P + (1 − β) Q (arXiv 2306.13649, eq. 1); over β
    it goes to forward_kl as β falls to 0.
    """
    if kind == "forward_kl":
        return _kl(p, q)
    if kind == "reverse_kl":
        return _kl(q, p)
    middle = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def in_buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and, behind them, of all others together: (n, k + 1) float32.

    logits: (n, V) float32. ids: (n, k) int64, k < V. A divergence between two such distributions is at most that of
    the whole ones, for to lump outcomes together is to look less closely (data processing inequality).
    """
    whole = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], dim=-1) - whole


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)
