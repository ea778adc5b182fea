"""What the calibration inputs of a linear tell, collected by the engine as they pass."""

import torch
from torch import Tensor


class Hessian:
    """H = 2/n · Σ x xᵀ over the n input vectors x seen, (in, in) float32 (arXiv 2210.17323 §3).

    Linears that read the same input share one. Cholesky factors are kept by damping and column order, so that the
    second of them costs no factorisation.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.count = 0
        self.factors: dict[object, tuple[Tensor, float, int]] = {}

    def add(self, inputs: Tensor) -> None:
        """inputs: (…, in), any floating type; summed in float32."""
        X = inputs.reshape(-1, inputs.shape[-1]).float()  # (n, in)
        self._sum.addmm_(X.T, X)
        self.count += X.shape[0]

    @property
    def matrix(self) -> Tensor:
        return self._sum * (2.0 / max(self.count, 1))

    def error_of(self, difference: Tensor, W: Tensor) -> float:
        """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the share of the layer's output energy that its compression changed."""
        H = self._sum
        changed = (difference @ H).mul_(difference).sum(dtype=torch.float64)
        whole = (W @ H).mul_(W).sum(dtype=torch.float64)
        return float(changed / whole) if whole > 0 else 0.0
