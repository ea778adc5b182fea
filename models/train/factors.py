"""Linears that learn as two factors, which an earlier step wrote them as: what is learned has their rank.

Each factor is a parameter of its own, in float32; of linears that share their second factor it is one parameter, which
learns from all of them. What is written multiplies both in float32 and rounds once; beside it both are kept.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from models.files.checkpoint import SourceModel, open_model
from models.formats.directory import written_whole
from models.prune.factors.handed import HandedFactors
from models.train.merging import stored_dtype
from models.weights.factored import Factored
from models.weights.plain import saturated
from models.weights.quantized import QuantizedModel, block_file, tensors_of

FACTORS = "factors"  # in the work directory


class LearningFactors(nn.Module):
    """Takes the place of a linear. left: (out, rank). right: (rank, in), perhaps another's too.

    Linears that share `right` multiply by it each for itself: a product that is kept from one to the next would outlive
    the batch, and be another where activations are computed again.
    """

    def __init__(self, plain: nn.Module, left: nn.Parameter, right: nn.Parameter) -> None:
        super().__init__()
        self.left, self.right, self.bias = left, right, cast(nn.Parameter | None, plain.bias)
        weight = cast(Tensor, plain.weight)
        plain._parameters["weight"] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        self._plain = [plain]  # a list hides it from nn.Module's registry

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    def rounded(self, scheme: Any, dtype: torch.dtype) -> Factored:
        return Factored(saturated(self.left.detach(), dtype), saturated(self.right.detach(), dtype), scheme)

    def multiplied_out(self, dtype: torch.dtype) -> nn.Module:
        """The plain linear, whose weight is the product, made in float32 and rounded once."""
        (plain,) = self._plain
        weight = saturated(self.left.detach().float() @ self.right.detach().float(), dtype)
        weight = weight.T.contiguous() if isinstance(plain, Conv1D) else weight
        plain._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return plain


def put(model: Any, factors: QuantizedModel) -> None:
    """Has factors stand where linears stand. model: transformers' own, with the weights of the plain model."""
    shared: dict[str, nn.Parameter] = {}
    for name, scheme in factors.schemes.items():
        codes, plain = factors.codes(name), model.get_submodule(name)
        assert isinstance(codes, Factored), "all linears of such a step are factored"
        device, dtype = plain.weight.device, plain.weight.dtype
        basis = scheme.basis or name
        if basis not in shared:
            shared[basis] = nn.Parameter(codes.right.to(device, dtype), requires_grad=False)
        left = nn.Parameter(codes.left.to(device, dtype), requires_grad=False)
        model.set_submodule(name, LearningFactors(plain, left, shared[basis]))


def _all(model: Any) -> Iterator[tuple[str, LearningFactors]]:
    yield from [(name, one) for name, one in model.named_modules() if isinstance(one, LearningFactors)]


def keep_factors(model: Any, source: SourceModel, before: HandedFactors, directory: Path) -> None:
    """Writes what was learned, in the type that the plain model is stored in, as a step that factors does."""
    dtype, blocks, schemes = stored_dtype(source), f"{source.row.blocks}.", before.of(source).schemes
    files: dict[int, dict[str, LearningFactors]] = {}
    for name, one in _all(model):
        index = int(name.removeprefix(blocks).partition(".")[0])
        files.setdefault(index, {})[name] = one
    with written_whole(directory) as partial:
        for index, linears in files.items():
            codes = {name: one.rounded(schemes[name], dtype) for name, one in linears.items()}
            save_file(dict(tensors_of(codes)), block_file(partial, index))


def multiply_out(model: Any, source: SourceModel) -> None:
    """Has plain linears stand where factors stood, one after the other."""
    for name, one in _all(model):
        model.set_submodule(name, one.multiplied_out(stored_dtype(source)))


def learned_factors(before: HandedFactors, directory: Path, whole: Path) -> HandedFactors:
    """What a training kept. whole: the plain model that it wrote."""
    told, plain = before.told, open_model(whole)
    fewer = (told.parameters_before - told.parameters_after) * plain.dtype.itemsize
    return HandedFactors(directory, told.model_copy(update={"factor_bytes": plain.weight_bytes - fewer}))
