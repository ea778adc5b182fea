"""Low rank: a singular value decomposition of what a linear's weights do to its inputs, cut short.

Source: Wang et al., SVD-LLM, arXiv 2403.07378 §3.1: with H = S Sᵀ the second moment of the inputs, cutting the singular
values of W S loses exactly their squares of the outputs' energy, which is the least that any matrix of that rank can
lose. We differ so: outputs are weighed too, by the second moment G = A Aᵀ of the gradients there, where that is known:
the singular values of Aᵀ W S are cut, and their squares are the predicted divergence, ½ tr(G ΔW H ΔWᵀ), which then is
the least for that rank. It is found by the eigenvectors of the smaller of both products of Aᵀ W S with itself, in
float64: on the side of the outputs no root of H is needed, on that of the inputs none of G. Some of the mean is added
to both diagonals, so that what the text does not show is not taken for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.quantize.feedback import DAMPING_FACTOR, MOST_DAMPING
from models.quantize.problem import Problem, Solution
from models.resources import return_free_memory
from models.streaming.statistics import Drift, Hessian
from models.weights.factored import Factored
from models.weights.plain import saturated
from squeeze.errors import FactorisationFailed
from squeeze.steps.factoring import SVD

TILE = 1024  # columns of a second moment that are widened at once
GRADIENT_DAMPING = 0.1  # a sketch of so many sums knows no more directions than that
LEAST = 1e-30


@dataclass(frozen=True)
class Decomposition:
    """Of Aᵀ W S. losses: its squared singular values, the largest first, float64. left, right: (out, n), (n, in)
    float64: their product is W, that of the first r columns and rows the best of rank r. damping: of H, as a share of
    its mean diagonal, and how often that had to be raised.
    """

    losses: Tensor
    left: Tensor
    right: Tensor
    damping: float
    escalations: int


def prune(problem: Problem, step: SVD) -> Solution:
    """The factors of linears with one input, the second shared where they are several.

    Raises FactorisationFailed where no damping makes the second moment of the inputs positive definite.
    """
    if problem.statistics is None or problem.statistics.hessian is None:
        raise ValueError("a decomposition needs the second moment of the layer's inputs")
    rank, hessian, drift = problem.scheme.rank, problem.statistics.hessian, problem.statistics.drift
    W = problem.W if drift is None else fitted(problem.W, hessian, drift, step.damping)
    return_free_memory()  # of the root: the decomposition's pieces don't fit into the holes that it left
    found = decomposed(W, hessian, step.damping, problem.gradients)
    left, right = found.left[:, :rank], found.right[:rank]
    # Of one size, so that neither leaves the range of a 16-bit type.
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(LEAST)).sqrt().clamp_min(LEAST)
    factored = Factored(
        saturated((left * balance).float(), problem.dtype).contiguous(),
        saturated((right / balance.unsqueeze(1)).float(), problem.dtype).contiguous(),
        problem.scheme,
    )
    return Solution(factored, found.damping, found.escalations)


def decomposed(W: Tensor, hessian: Hessian, damping: float, gradients: Sequence[Tensor] | None) -> Decomposition:
    """W: (out, in) float32. gradients: of the linears whose outputs these are, one after the other, (n, out) float32,
    whose second moment, summed, is that of the outputs; None: outputs count alike. H is the mean over tokens.
    """
    gram, factors, damping, escalations = _damped(W, hessian, damping, gradients)
    losses, vectors = torch.linalg.eigh(gram)
    del gram
    return Decomposition(losses.clamp_min(0).flip(0), *factors(vectors.flip(1)), damping, escalations)


def losses_of(W: Tensor, hessian: Hessian, damping: float, gradients: Sequence[Tensor] | None) -> Tensor:
    """As those of `decomposed`, without its factors."""
    gram = _damped(W, hessian, damping, gradients)[0]
    losses: Tensor = torch.linalg.eigvalsh(gram)
    return losses.clamp_min(0).flip(0)


def fitted(W: Tensor, hessian: Hessian, drift: Drift, damping: float) -> Tensor:
    """The weights whose outputs on the inputs x as they are now come nearest to those of W on what they would be, x̃:
    W + W Σ (x̃ − x) xᵀ (Σ x xᵀ)⁻¹, float32. Where no damping makes that root, W as it is.
    """
    if drift.count == 0:
        return W
    mean = float(hessian.diagonal.double().mean())
    while damping <= MOST_DAMPING:
        H = hessian.sum.double()
        H.diagonal().add_(damping * mean)
        _, failed = torch.linalg.cholesky_ex(H, out=(H, torch.empty((), dtype=torch.int32, device=H.device)))
        if not failed and bool(torch.isfinite(H.diagonal()).all()):
            # `cholesky_solve` would copy the root.
            half_way = torch.linalg.solve_triangular(H, (W @ drift.sum).T.double(), upper=False)  # (in, out)
            made_up: Tensor = torch.linalg.solve_triangular(H.T, half_way, upper=True)
            return W + made_up.T.float()
        damping *= DAMPING_FACTOR
    return W


# Of the eigenvectors, those of the largest values first, as columns: (left, right) as in `Decomposition`.
Factors = Callable[[Tensor], tuple[Tensor, Tensor]]


def _damped(
    W: Tensor, hessian: Hessian, damping: float, gradients: Sequence[Tensor] | None
) -> tuple[Tensor, Factors, float, int]:
    """(the smaller product of Aᵀ W S with itself, what makes factors, damping as it was in the end, its escalations)"""
    mean = float(hessian.diagonal.double().mean()) / max(hessian.count, 1)
    multiplied = _by_outputs if len(W) <= W.shape[1] else _by_inputs
    escalations = 0
    while damping <= MOST_DAMPING:
        found = multiplied(W.double(), hessian, (damping * mean) if mean > 0 else 1.0, gradients)
        if found is not None:
            gram, factors = found
            return gram.add_(gram.T.clone()).div_(2), factors, damping, escalations
        damping, escalations = damping * DAMPING_FACTOR, escalations + 1
    raise FactorisationFailed(
        f"the second moment of the inputs of a layer with {W.shape[1]} of them is not positive definite even with "
        f"damping {MOST_DAMPING:g}; its activations are degenerate: give other or more calibration text"
    )


def _by_outputs(
    W: Tensor, hessian: Hessian, added: float, gradients: Sequence[Tensor] | None
) -> tuple[Tensor, Factors] | None:
    """Of Aᵀ W H Wᵀ A, (out, out)."""
    A: Tensor | None = None
    B = W
    if gradients is not None:
        G: Tensor = torch.block_diag(*(S.T @ S for S in map(Tensor.double, gradients)))  # type: ignore[no-untyped-call]
        G.diagonal().add_(_share(G.diagonal().mean()))
        A = torch.linalg.cholesky(G)
        B = A.T @ W
    gram = added * (B @ B.T)
    for start in range(0, W.shape[1], TILE):
        columns = slice(start, start + TILE)
        gram += (B @ hessian.sum[:, columns].double() / max(hessian.count, 1)) @ B[:, columns].T
    if not bool(torch.isfinite(gram).all()):
        return None

    def factors(P: Tensor) -> tuple[Tensor, Tensor]:
        left = P if A is None else torch.linalg.solve_triangular(A.T, P, upper=True)
        return left, P.T @ B

    return gram, factors


def _by_inputs(
    W: Tensor, hessian: Hessian, added: float, gradients: Sequence[Tensor] | None
) -> tuple[Tensor, Factors] | None:
    """Of Sᵀ Wᵀ G W S, (in, in)."""
    H = hessian.sum.double() / max(hessian.count, 1)
    H.diagonal().add_(added)
    S, failed = torch.linalg.cholesky_ex(H)
    del H
    if failed or not bool(torch.isfinite(S.diagonal()).all()):
        return None
    B = W @ S
    gram = B.T @ B
    if gradients is not None:
        energy = sum(float(one.square().sum(dtype=torch.float64)) for one in gradients)
        gram *= _share(energy / len(W))
        # One linear after the other: what its outputs have in common with the others' is left out.
        for one, rows in zip(gradients, B.split([one.shape[1] for one in gradients]), strict=True):
            seen = one.double() @ rows
            gram += seen.T @ seen

    def factors(Q: Tensor) -> tuple[Tensor, Tensor]:
        return B @ Q, torch.linalg.solve_triangular(S.T, Q, upper=True).T

    return gram, factors


def _share(mean: Tensor | float) -> float:
    """What is added to the diagonal of G, by its mean."""
    return max(GRADIENT_DAMPING * float(mean), LEAST)
