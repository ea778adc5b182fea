"""Factors that a step wrote linears as: a job's rounds hand them on beside the plain model, where they are one."""

from dataclasses import dataclass
from pathlib import Path

import torch

from models.files.checkpoint import SourceModel
from models.streaming.frame import Frame
from models.weights.quantized import QuantizedModel
from squeeze.reports.report import Factoring
from squeeze.steps.factoring import SVD
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class HandedFactors:
    """directory: files of blocks, which hold `<linear>.left` and `<linear>.right`. told: the report's part of these."""

    directory: Path
    told: Factoring

    def of(self, plain: SourceModel) -> QuantizedModel:
        """plain: the model in which they are multiplied out."""
        frame, found = Frame(plain, torch.float32, torch.device("cpu")), {one.name: one for one in self.told.layers}
        sites, schemes = {}, {}
        for site in (site for n in range(frame.count) for site in frame.sites(n) if site.name in found):
            layer = found[site.name]
            if layer.rank is not None:
                bits = 8 * plain.dtype.itemsize
                schemes[site.name] = Scheme("factored", bits, "channel", rank=layer.rank, basis=layer.basis)
                sites[site.name] = site
        ignored = tuple(site.name for n in range(frame.count) for site in frame.sites(n) if site.name not in sites)
        step = SVD(method="svd", params_target=self.told.target)
        return QuantizedModel(self.directory, step, sites, schemes, ignored, plain.dtype)
