"""How many zeros each decoder block can bear: the fewer, the more outliers there are among its weights.

Source: Yin et al., arXiv 2310.05175 (OWL): the layerwise outlier distribution is the share of a block's |W_ij| · ‖X_j‖
above `outlier_multiple` times their mean, in the model as it is; blocks get the target plus or minus up to
`outlier_spread`, the most zeros where the share is the least. We differ so: ‖X_j‖ is the root mean square, which is the
same but for a mixture's experts, to which fewer tokens come; and the mean of the target is that over weights, so that
blocks of different size make exactly as many zeros together as were asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.progress import Notify
from models.streaming.frame import Frame
from models.streaming.statistics import Moments
from models.streaming.walk import walk
from models.weights.plain import CHUNK
from models.weights.quantized import Site
from squeeze.objects import Stage
from squeeze.reports.zeros import BlockZeros
from squeeze.steps.schemes import Scheme
from squeeze.steps.sparsifying import Uneven

TEXT = "calibration"


def spread(
    frame: Frame,
    step: Uneven,
    schemes: Mapping[str, Scheme],
    calibration: Tensor,
    directory: Path,
    mark: str,
    notify: Notify,
    snapshot_seconds: float,
    memory_bytes: int | None = None,
) -> tuple[dict[str, Scheme], list[BlockZeros]]:
    """Every linear's scheme with its share of zeros, and why. calibration: (n, T) int64.

    directory, mark, memory_bytes: of the pass through the model as it is, as in `models.streaming.walk`.
    """
    frame.refuse_misfits()
    notify.stage(Stage.calibrating)
    watcher = _Outliers(frame, schemes, step.outlier_multiple)
    texts, watchers = {TEXT: calibration}, {TEXT: watcher}
    walk(frame, texts, directory, mark, notify, snapshot_seconds, watchers=watchers, memory_bytes=memory_bytes)
    sites = [[site for site in frame.sites(n) if site.name in schemes] for n in range(frame.count)]
    weights = [sum(site.rows * site.columns for site in some) for some in sites]
    outliers = watcher.sums["outliers"].tolist()
    shares = shares_of(outliers, weights, step)
    told = [BlockZeros(index=n, outliers=outliers[n], sparsity=share) for n, share in enumerate(shares) if weights[n]]
    least, most = min(told, key=lambda one: one.sparsity), max(told, key=lambda one: one.sparsity)
    notify.event(
        "info",
        f"zeros by outliers: from {least.sparsity:.1%} in block {least.index} to {most.sparsity:.1%} in block "
        f"{most.index}",
    )
    counts = _counts([(site, share) for some, share in zip(sites, shares, strict=True) for site in some], step)
    return {name: replace(scheme, sparsity=counts[name]) for name, scheme in schemes.items()}, told


def shares_of(outliers: Sequence[float], weights: Sequence[int], step: Uneven) -> list[float]:
    """Of each block's weights, what becomes zero; their mean over all weights is the target. outliers: shares."""
    held = [one for one, count in zip(outliers, weights, strict=True) if count]
    low, high = min(held), max(held)
    scale = 2 * step.outlier_spread / (high - low) if high > low else 0.0
    fewer = [(one - low) * scale for one in outliers]
    mean = sum(one * count for one, count in zip(fewer, weights, strict=True)) / sum(weights)
    return [step.sparsity + mean - one for one in fewer]


def _counts(linears: Sequence[tuple[Site, float]], step: Uneven) -> dict[str, float]:
    """Each linear's share. What rounding to whole weights leaves over or short of the target goes to the largest."""
    shares = {site.name: share for site, share in linears}
    sizes = {site.name: site.rows * site.columns for site, _ in linears}
    missing = round(step.sparsity * sum(sizes.values())) - sum(
        round(size * shares[name]) for name, size in sizes.items()
    )
    largest = max(sizes, key=lambda name: sizes[name])
    shares[largest] = (round(sizes[largest] * shares[largest]) + missing) / sizes[largest]
    return shares


class _Outliers:
    """Of each block, the share of |W| · ‖X‖ above so many times their mean, once a whole text went through it."""

    def __init__(self, frame: Frame, names: Mapping[str, object], multiple: float) -> None:
        self._frame, self._names, self._multiple = frame, names, multiple
        self.sums = {"outliers": torch.zeros(frame.count, dtype=torch.float64)}

    @contextmanager
    def watching(self, index: int, block: nn.Module) -> Iterator[None]:  # noqa: ARG002 - a Watcher's
        linears = {site: self._frame.module(site) for site in self._frame.sites(index) if site.name in self._names}
        moments = {site: Moments(site.columns, self._frame.device) for site in linears}
        handles = [one.register_forward_pre_hook(_adding(moments[site])) for site, one in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if linears:
            self.sums["outliers"][index] = self._share(linears, moments)

    def seen(self, index: int, before: Tensor, after: Tensor) -> None:
        pass

    def _share(self, linears: Mapping[Site, nn.Module], moments: Mapping[Site, Moments]) -> float:
        """Goes through the block's weights twice, since their scores may be more than there is room for."""
        whole = sum(site.rows * site.columns for site in linears)
        total = sum(float(part.sum(dtype=torch.float64)) for part in _scores(linears, moments))
        least = self._multiple * total / whole
        return sum(int((part > least).sum()) for part in _scores(linears, moments)) / whole


def _adding(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, given: moments.add(given[0].reshape(-1, given[0].shape[-1]))


def _scores(linears: Mapping[Site, nn.Module], moments: Mapping[Site, Moments]) -> Iterator[Tensor]:
    """|W| · ‖X‖ of some rows after the other, (rows, in) float32."""
    for site, linear in linears.items():
        weight = linear.weight
        assert isinstance(weight, Tensor)
        X_norm = moments[site].mean_square.sqrt()
        for rows in torch.split(weight.t() if site.transposed else weight, max(1, CHUNK // site.columns)):
            yield rows.float().abs().mul_(X_norm)
