"""Divergences against their formulas in float64, and against each other."""

import pytest
import torch
from torch import Tensor

from models.distill.divergence import diverged, in_buckets


def drawn(seed: int, vocabulary: int = 50) -> Tensor:
    """Logits (20, V)."""
    return 3 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(seed))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)


def test_divergences_are_those_of_their_formulas() -> None:
    p, q = (drawn(seed).log_softmax(-1) for seed in (0, 1))
    P, Q = p.double().exp(), q.double().exp()
    M = 0.3 * P + 0.7 * Q
    for kind, wanted in (
        ("forward_kl", kl(P, Q)),
        ("reverse_kl", kl(Q, P)),
        ("jsd", 0.3 * kl(P, M) + 0.7 * kl(Q, M)),
    ):
        torch.testing.assert_close(diverged(p, q, kind, 0.3).double(), wanted, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]
        assert diverged(p, p, kind, 0.3).abs().max() < 1e-6  # type: ignore[arg-type]


def test_jensen_and_shannon_s_divergence_over_beta_goes_to_the_forward_one() -> None:
    p, q = (drawn(seed).double().log_softmax(-1) for seed in (0, 1))
    torch.testing.assert_close(diverged(p, q, "jsd", 1e-9) / 1e-9, diverged(p, q, "forward_kl", 0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        diverged(p, q, "jsd", 1 - 1e-9) / 1e-9, diverged(p, q, "reverse_kl", 0.5), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_lumping_what_is_unlikely_together_never_makes_the_divergence_larger(kind: str) -> None:
    teacher, student = drawn(2), drawn(3)
    whole = diverged(teacher.log_softmax(-1), student.log_softmax(-1), kind, 0.5)  # type: ignore[arg-type]
    before = torch.zeros(20)
    for k in (1, 5, 20, 49):
        ids = teacher.topk(k, dim=-1).indices
        p, q = in_buckets(teacher, ids), in_buckets(student, ids)
        torch.testing.assert_close(p.exp().sum(-1), torch.ones(20))
        some = diverged(p, q, kind, 0.5)  # type: ignore[arg-type]
        assert (some <= whole + 1e-4).all() and (some >= before - 1e-4).all()
        before = some
    torch.testing.assert_close(before, whole, rtol=1e-4, atol=1e-5)  # 49 of 50 leave one for the last
