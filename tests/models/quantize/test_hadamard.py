"""The matrices of rotations against what makes them what they are."""

import pytest
import torch

from models.quantize.hadamard import Rotation, paley


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 32, 36, 44, 60, 68, 76, 84, 108, 124, 140])
def test_paley_s_matrices_have_entries_of_one_size_and_orthogonal_rows(order: int) -> None:
    H = paley(order)
    assert H is not None
    assert bool((H.abs() == 1).all())
    assert torch.equal(H @ H.T, order * torch.eye(order))


@pytest.mark.parametrize("order", [6, 16, 40, 52, 92, 100])
def test_an_order_that_no_prime_gives_is_not_made_up(order: int) -> None:
    H = paley(order)
    assert H is None or torch.equal(H @ H.T, order * torch.eye(order))


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (1, "Hadamard of order 1"),
        (64, "Hadamard of order 64"),
        (576, "Hadamard of order 36 × 16"),
        (896, "Hadamard of order 28 × 32"),
        (960, "Hadamard of order 60 × 16"),
        (1536, "Hadamard of order 12 × 128"),
        (46, "random orthogonal 23 × Hadamard of order 2"),
        (15, "random orthogonal 15 × Hadamard of order 1"),
    ],
)
def test_a_rotation_keeps_lengths_and_spreads_one_number_over_all(size: int, kind: str) -> None:
    rotation = Rotation(size)
    Q = rotation.apply(torch.eye(size))
    assert rotation.kind == kind
    assert torch.allclose(Q @ Q.T, torch.eye(size), atol=1e-5)
    if kind.startswith("Hadamard"):
        assert torch.allclose(Q.abs(), torch.full_like(Q, size**-0.5), rtol=1e-5)
    X = torch.randn(3, 2, size)
    assert torch.allclose(rotation.apply(X), X @ Q, atol=1e-4)
    assert torch.equal(Rotation(size).apply(X), rotation.apply(X))
