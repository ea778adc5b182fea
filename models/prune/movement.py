"""Movement pruning: scores that learn beside the weights say which of these are zero (Sanh et al., arXiv 2005.07683).

Source: section 4; hard movement pruning, with the masks of each layer by themselves. S: scores of a weight W (out, in),
float32, zero at first; M: 1 where a weight counts, 0 for the share with the lowest scores. The model computes with
W' = W ⊙ M; straight through the mask, ∂L/∂S = ∂L/∂W' ⊙ W and ∂L/∂W = ∂L/∂W' ⊙ M, with W as it is beneath the mask, so
that a weight that was zeroed comes back once its score says so.
Differs: a pattern N:M is reached step by step too. Of the N lowest of every M neighbours, which change as the scores
do, the lowest of the layer go first. A weight that was zero from the beginning has the lowest score and stays zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from models.prune.zeroing.masks import Group, lowest_of_layer
from models.quantize.problem import pruned
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.errors import ModelMalformed
from squeeze.shapes.mixtures import refuse_unscored
from squeeze.steps.movement import Movement

LOWEST = -1e30  # a score that nothing learns its way up from; finite, so that averages of it are


def sites_of(frame: Frame, step: Movement) -> list[Site]:
    """The linears that get zeros, in the model's order. Raises ModelMalformed where there are none,
    ArchitectureUnsupported where the model is a mixture, which keeps the weights of several experts in one.
    """
    refuse_unscored(frame.source.config["model_type"], "method")
    sites = [site for n in range(frame.count) for site in frame.sites(n)]
    found = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in step.ignore)]
    if not found:
        raise ModelMalformed("`ignore` leaves no linear layer to prune", param="ignore")
    return found


def finetune(model: Any, step: Movement, names: Sequence[str]) -> Any:  # noqa: ARG001 - all, whatever these are
    """The model with all of its parameters in float32, which learn."""
    return model.float().requires_grad_(True)


def prune(model: nn.Module, step: Movement, sites: Sequence[Site], steps: int) -> "Scores":
    """Scores for the named linears of a model that learns for so many steps."""
    return Scores(model, step, sites, steps)


class Scores(nn.Module):
    """The scores of all linears that get zeros, which learn beside the model, and the masks that they make.

    final: the steps after which as many weights are zero as were asked for.
    """

    def __init__(self, model: nn.Module, step: Movement, sites: Sequence[Site], steps: int) -> None:
        super().__init__()
        self._step, self._steps = step, steps
        self.final = step.ramp(steps)[1]
        self._names = [f"{site.name}.weight" for site in sites]
        self._weights = [_weight_of(model, site) for site in sites]
        self._transposed = [site.transposed for site in sites]
        self._gone: list[Tensor | None] = [None] * len(sites)
        self.scores = nn.ParameterList(map(_scores_of, self._weights))

    def share(self, done: int) -> float:
        """Of zeros, after so many steps."""
        return self._step.zeroed_after(done, self._steps)

    @contextmanager
    def in_place(self, done: int) -> Iterator[None]:
        """Within, the weights are as the model computes with them after so many steps."""
        self._decide(self.share(done))
        kept = [None if gone is None else self._zeroed(W, gone) for W, gone in self._pairs()]
        try:
            yield
        finally:
            with torch.no_grad():
                for (W, gone), values in zip(self._pairs(), kept, strict=True):
                    if gone is not None and values is not None:
                        W.data.masked_scatter_(gone, values)

    @torch.no_grad()
    def straight_through(self) -> None:
        """After the backward pass of a model whose weights were `in_place`: the gradients of the scores and weights
        from those of what the model computed with.
        """
        for (W, gone), S in zip(self._pairs(), self.scores, strict=True):
            assert W.grad is not None, "all of them learn"
            S.grad = W.grad * W
            if gone is not None:
                W.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def settle(self) -> None:
        """Zeroes for good what the scores say, as many as were asked for."""
        self._decide(self._step.sparsity)
        for W, gone in self._pairs():
            if gone is not None:
                W.masked_fill_(gone, 0)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
        return zip(self._weights, self._gone, strict=True)

    @torch.no_grad()
    def _decide(self, share: float) -> None:
        whole = share == self._step.sparsity
        for n, (S, transposed) in enumerate(zip(self.scores, self._transposed, strict=True)):
            rows = S.detach().t().contiguous() if transposed else S.detach()
            gone = lowest_scores(rows, share, self._step.group, whole=whole) if share else None
            self._gone[n] = gone.t() if gone is not None and transposed else gone

    @staticmethod
    @torch.no_grad()
    def _zeroed(W: nn.Parameter, gone: Tensor) -> Tensor:
        """Zeroes some weights; what they were."""
        kept = W.masked_select(gone)
        W.masked_fill_(gone, 0)
        return kept


def lowest_scores(S: Tensor, share: float, group: Group | None, *, whole: bool) -> Tensor:
    """True for the share of the lowest scores, (out, in); with a group none but those that its pattern lets go. whole:
    as many as the pattern has.
    """
    if group is None or whole:
        return lowest_of_layer(S, share, group)
    able = lowest_of_layer(S, share, group)
    return lowest_of_layer(S.masked_fill(~able, torch.inf), share, None)


def _weight_of(model: nn.Module, site: Site) -> nn.Parameter:
    weight = model.get_submodule(site.name).weight
    assert isinstance(weight, nn.Parameter), "it is a linear"
    return weight


@torch.no_grad()
def _scores_of(W: nn.Parameter) -> nn.Parameter:
    zeros = pruned(W.detach())
    return nn.Parameter(torch.zeros_like(W) if zeros is None else torch.zeros_like(W).masked_fill_(zeros, LOWEST))
