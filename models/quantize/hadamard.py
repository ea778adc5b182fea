"""Orthogonal matrices that spread every number evenly over all others, applied without ever being written out.

A Hadamard matrix has entries ±1 and orthogonal rows. Orders that are a power of two are Sylvester's, applied by the
fast transform. For other sizes the matrix is a Kronecker product of Sylvester's with one of Paley's (1933), which there
is for most sizes that models have (12, 20, 28, 36, 44, 60, … times a power of two); where there is none, with a random
orthogonal matrix of the odd factor. Signs drawn by chance come first, so that no vector of a model, the constant one
for example, falls on a row of the matrix (QuaRot, arXiv 2404.00456 §3).
"""

import math

import torch
from torch import Tensor

SEED = 0


class Rotation:
    """Q (size, size), orthogonal: random signs, then a Hadamard matrix over its norm."""

    def __init__(self, size: int) -> None:
        self.size = size
        dice = torch.Generator().manual_seed(SEED)
        self._signs = torch.randint(0, 2, (size,), generator=dice).mul_(2).sub_(1).float()
        odd = size // (size & -size)
        orders = [odd << doublings for doublings in range((size // odd).bit_length())]
        found = next(((order, paley(order)) for order in orders if paley(order) is not None), None)
        if odd == 1:
            self._base, self.kind = torch.ones(1, 1), f"Hadamard of order {size}"
        elif found is not None and found[1] is not None:
            self._base = found[1] / math.sqrt(found[0])
            self.kind = f"Hadamard of order {found[0]} × {size // found[0]}"
        else:
            drawn = torch.randn(odd, odd, generator=dice, dtype=torch.float64)
            self._base = torch.linalg.qr(drawn)[0].float()
            self.kind = f"random orthogonal {odd} × Hadamard of order {size // odd}"

    def apply(self, X: Tensor) -> Tensor:
        """X Q. X: (…, size) float32."""
        base, inner = len(self._base), self.size // len(self._base)
        spread = _sylvester((X * self._signs).view(*X.shape[:-1], base, inner))
        if base > 1:
            spread = self._base.T @ spread  # (…, base, inner)
        return spread.reshape(X.shape).mul_(1 / math.sqrt(inner))


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of that order, (order, order) float32, by Paley's constructions over prime fields."""
    q = order - 1
    if order % 4 == 0 and _is_prime(q):  # q ≡ 3 (mod 4)
        return _bordered(q, -1) + torch.eye(order)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        conference = _bordered(q, 1)
        one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, one) + torch.kron(torch.eye(q + 1), other)
    return None


def _bordered(q: int, sign: int) -> Tensor:
    """[[0, 1ᵀ], [sign, J]], J the Jacobsthal matrix of the prime field of q: whether i − j is a square."""
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if x in squares else -1.0 for x in range(1, q))])
    places = torch.arange(q)
    S = torch.zeros(q + 1, q + 1)
    S[0, 1:], S[1:, 0] = 1, sign
    S[1:, 1:] = character[(places.unsqueeze(1) - places) % q]
    return S


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _sylvester(X: Tensor) -> Tensor:
    """X times Sylvester's ±1 matrix along the last axis, whose length is a power of two."""
    size, width = X.shape[-1], 1
    while width < size:
        a, b = X.reshape(*X.shape[:-1], size // (2 * width), 2, width).unbind(-2)
        X = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        width *= 2
    return X
