"""SparseGPT: weights become zero column by column, and the columns still to come make up for it.

Source: Frantar and Alistarh, arXiv 2301.00774, §3 and the authors' reference code: in blocks of 128 columns the weights
go whose w² / [H⁻¹]_jj is the least, H⁻¹ that of the columns from j on and w with all that earlier columns put on it; of
a pattern, those of every few neighbours. Written as `models.quantize.feedback` writes GPTQ, with H = G D² Gᵀ and no
inverse: then 1 / [H⁻¹]_jj is D_j², and what a column keeps or loses is one more way to round it. We differ so: linears
with a shared input share the factor, though each has its own share of zeros; a column whose inputs were never active is
judged as if they were as active as the mean, instead of being set to zero; exactly as many weights go as asked for.
"""

import torch
from torch import Tensor

from models.plain import Plain, saturated
from models.prune.masks import Group, count_of, lowest
from models.quantize.feedback import factorised
from models.quantize.problem import Problem, Solution
from models.statistics import Factor
from squeeze.sparsifying import SparseGPT

BLOCK_COLUMNS = 128  # whose weights are compared with each other; a multiple of every pattern's neighbours


def prune(problem: Problem, step: SparseGPT) -> Solution:
    """Weights of linears with one input. Raises FactorisationFailed where no damping makes H positive definite."""
    if problem.statistics is None or problem.statistics.hessian is None:
        raise ValueError("SparseGPT needs the Hessian of the layer's inputs")
    factor = factorised(problem.statistics.hessian, step.damping, by_activation=False)
    pruned = torch.empty(problem.W.shape, dtype=problem.dtype, device=problem.W.device)
    for W, place in zip(problem.each(problem.W), problem.each(pruned), strict=True):
        place.copy_(saturated(zero_columns(W, factor, problem.scheme.sparsity, step.group), problem.dtype))
    return Solution(Plain(pruned, problem.scheme), factor.damping, factor.escalations)


def zero_columns(W: Tensor, factor: Factor, share: float, group: Group | None) -> Tensor:
    """The weights with zeros, (out, in) float32. W: (out, in) float32. factor: its first column stands last."""
    originals = W.T.contiguous()[factor.layout]  # (in, out): a column of W is a contiguous row here
    targets, errors = originals.clone(), torch.empty_like(originals)
    unit = BLOCK_COLUMNS if group is None else group[1]
    whole, rows = originals.numel(), len(W)
    for stop in range(len(originals), 0, -BLOCK_COLUMNS):
        start = max(0, stop - BLOCK_COLUMNS)
        for end in range(stop, start, -unit):
            few = slice(max(start, end - unit), end)
            if end < stop:  # what the columns of this block before these put on them
                targets[few].addmm_(factor.G[end:stop, few].T, errors[end:stop])
            count = count_of(whole - rows * few.start, share) - count_of(whole - rows * few.stop, share)
            goes = _chosen(originals[few], targets[few], factor.G[few, few], factor.D[few], count, group)
            _zero_singly(originals[few], targets[few], errors[few], factor.G[few, few], goes)
        targets[:start].addmm_(factor.G[start:stop, :start].T, errors[start:stop])
    result = torch.empty_like(originals)
    result[factor.layout] = targets
    return result.T.contiguous()


def _chosen(originals: Tensor, targets: Tensor, G: Tensor, D: Tensor, count: int, group: Group | None) -> Tensor:
    """True for the weights that go, of columns that are compared with each other. originals, targets: (columns, out).
    count: of those that go, without a pattern.

    The targets hold what the columns before put on each of them through G alone. What a column would be worth if none
    of these went is more: those before it make up for a part, and it for theirs.
    """
    moved = torch.linalg.solve_triangular(G.T, targets - originals, upper=True, unitriangular=True).add_(originals)
    scores = moved.mul_(D.unsqueeze(1)).square_()
    if group is not None:
        return lowest(scores.T.contiguous(), group[0]).T
    return lowest(scores.reshape(1, -1), count).view(scores.shape)


def _zero_singly(originals: Tensor, targets: Tensor, errors: Tensor, G: Tensor, goes: Tensor) -> None:
    """Each column's target becomes what is kept of it, from the last on. All but G: (columns, out)."""
    each = list(zip(originals.unbind(), targets.unbind(), errors.unbind(), goes.unbind(), strict=True))
    for i in range(len(each) - 1, -1, -1):
        w, t, error, gone = each[i]
        if i + 1 < len(each):
            t.addmv_(errors[i + 1 :].T, G[i + 1 :, i])
        torch.sub(w, t.masked_fill_(gone, 0), out=error)
