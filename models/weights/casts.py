"""What a cast of a whole model to a 16-bit type loses beyond the usual rounding."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.streaming.frame import exact_names, weightless
from models.weights.finite import all_finite
from models.weights.plain import CHUNK, within
from squeeze.errors import ModelAlreadyCompressed, NotFinite
from squeeze.reports.report import Block, Cast
from squeeze.shapes.model import COMPUTED


@dataclass(frozen=True)
class Loss:
    """counts: of weights that lost more than the usual rounding. relative_error: ‖after − before‖² / ‖before‖²."""

    counts: Cast
    relative_error: float


def castable(source: SourceModel) -> list[str]:
    """Names in the files of the tensors that a cast changes: floating-point numbers, less those that transformers keeps
    in float32 whatever the model's type.
    """
    model = weightless(source.path, torch.float32)
    exact = exact_names(model)
    kept = {source.file_key(name) for name in model.state_dict() if exact.search(name)}
    return [
        name
        for name, entry in source.entries.items()
        if entry.dtype.is_floating_point and name not in kept and not COMPUTED.search(name)
    ]


def losses(source: SourceModel, dtype: torch.dtype) -> dict[str, Loss]:
    """What each tensor that a cast changes would lose by it, by its name in the files; one tensor in memory at a time.
    Raises ModelAlreadyCompressed where there is nothing to cast, and NotFinite.
    """
    names = castable(source)
    if all(source.entries[name].dtype == dtype for name in names):
        kind = str(dtype).removeprefix("torch.")
        raise ModelAlreadyCompressed(f"the model is stored in {kind} already: a cast to {kind} would change nothing")
    found = {}
    for name in names:
        tensor = source.tensor(name)
        if not all_finite(tensor):
            raise NotFinite(f"tensor {name} holds NaN or infinity; the model is damaged at its source")
        found[name] = lost(tensor, dtype)
    return found


def lost(values: Tensor, dtype: torch.dtype) -> Loss:
    """What a cast of finite values to `dtype` loses. Those that only just exceed the largest number and would round to
    it are counted as saturated too.
    """
    limit = torch.finfo(dtype)
    counts, error, whole = torch.zeros(3, dtype=torch.int64), 0.0, 0.0
    for part in torch.split(values.reshape(-1), CHUNK):
        result, wide = within(part, dtype).to(dtype), part.to(torch.promote_types(part.dtype, torch.float32))
        size = wide.abs()
        small = size < limit.smallest_normal
        counts += torch.stack(
            [(size > limit.max).sum(), ((result == 0) & (size > 0)).sum(), ((result != 0) & small).sum()]
        ).cpu()
        error += float((result.to(wide.dtype) - wide).square().sum(dtype=torch.float64))
        whole += float(wide.square().sum(dtype=torch.float64))
    saturated, zeroed, denormal = counts.tolist()
    return Loss(Cast(saturated=saturated, zeroed=zeroed, denormal=denormal), error / whole if whole else 0.0)


def noted(blocks: Iterable[Block], found: Mapping[str, Loss], source: SourceModel) -> list[Block]:
    """The blocks with what each linear lost; the engine, which is given the model as it will be, can't see it."""
    return [
        block.model_copy(
            update={
                "layers": [
                    layer.model_copy(update={"relative_error": loss.relative_error, "cast": loss.counts})
                    for layer in block.layers
                    for loss in [found[source.module_key(layer.name, "weight")]]
                ]
            }
        )
        for block in blocks
    ]


def told(found: Mapping[str, Loss], dtype: torch.dtype) -> list[str]:
    """Warnings of what a cast loses; none where every weight keeps its size."""
    limit, kind = torch.finfo(dtype), str(dtype).removeprefix("torch.")
    beyond = {name: one.counts.saturated for name, one in found.items() if one.counts.saturated}
    warnings = []
    if beyond:
        most = sorted(beyond, key=lambda name: -beyond[name])[:5]
        warnings.append(
            f"{sum(beyond.values()):,} weights of {len(beyond)} tensors lie beyond ±{limit.max:.6g}, the largest that "
            f"{kind} holds, and become that: {', '.join(f'{name} ({beyond[name]:,})' for name in most)}"
            f"{' …' if len(beyond) > len(most) else ''}"
        )
    zeroed = sum(one.counts.zeroed for one in found.values())
    denormal = sum(one.counts.denormal for one in found.values())
    if zeroed:
        warnings.append(
            f"{zeroed:,} weights are smaller than {kind} can hold and become zero; {denormal:,} more lose some of "
            f"their bits, being smaller than {limit.smallest_normal:.3g}"
        )
    return warnings
