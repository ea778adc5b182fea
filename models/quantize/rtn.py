"""Round to nearest: every weight on its own. The baseline that the others have to beat; needs no data."""

import torch
from torch import Tensor

from models.codes import Codes
from models.quantize.grid import fit, round_to
from models.quantize.solution import Solution
from models.statistics import Hessian
from squeeze.steps import RTN


def quantize(W: Tensor, statistics: Hessian | None, step: RTN, group_size: int, dtype: torch.dtype) -> Solution:
    """Codes of one linear. W: (out, in) float32. dtype: of the model, which bounds what scales can be stored."""
    del statistics  # looks at no data
    rows, columns = W.shape
    grouped = W.view(rows, columns // group_size, group_size)
    scale, zero = fit(grouped, step.bits, step.symmetric, dtype, importance=None)
    codes = round_to(grouped, scale, zero, step.bits)
    return Solution(
        Codes(
            codes.to(torch.uint8).view(rows, columns),
            scale,
            zero.to(torch.uint8),
            step.bits,
            group_size,
            step.symmetric,
        )
    )
