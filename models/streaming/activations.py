"""What a consumer does to the inputs of a linear that multiplies rounded activations, done to the same effect."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from models.weights.float_codes import LARGEST_E4M3, exact_in, to_e4m3
from squeeze.steps.schemes import Activations, Scheme

LARGEST_INT8 = 127.0
OUTLIER = 6.0  # the threshold of LLM.int8(), and what bitsandbytes runs with by default


def rounded(X: Tensor, kind: Activations, scale: Tensor | None = None) -> Tensor:
    """X (…, in) as the linear's kernel sees it, in X's type.

    `int8` and `float8`: one scale a token, its largest magnitude over 127 or 448 (vLLM's dynamic per-token scheme).
    `llm-int8`: columns that hold an outlier in any token of a sequence stay as they are, the others are rounded as for
    `int8`, to a scale that knows no outliers (arXiv 2208.07339; bitsandbytes looks at all sequences of a call at once).
    `float8-static`: `scale`, one number, found while calibrating; what lies beyond it saturates.
    """
    values = X.float()
    if kind == "float8-static":
        if scale is None:
            raise ValueError("static activations need their scale")
        return to_e4m3(values / scale.float()).float().mul_(scale.float()).to(X.dtype)
    if kind == "llm-int8":
        return _int8_but_outliers(X)
    largest = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
    if kind == "int8":
        step = largest / LARGEST_INT8
        return torch.round(values / step).clamp_(-128, 127).mul_(step).to(X.dtype)
    step = largest / LARGEST_E4M3
    return to_e4m3(values / step).float().mul_(step).to(X.dtype)


def static_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of a linear's inputs, (1,), from the largest magnitude of each column, (in,) float32.

    In the model's dtype, in which compressed-tensors keeps it.
    """
    return exact_in((largest.max() / LARGEST_E4M3).reshape(1), dtype).to(dtype)


@contextmanager
def rounding_inputs(
    schemes: Mapping[str, Scheme], linears: Mapping[str, nn.Module], scales: Mapping[str, Tensor]
) -> Iterator[None]:
    """Meanwhile, linears whose scheme says so read rounded activations."""
    handles = []
    for name, scheme in schemes.items():
        if scheme.activations is not None:
            rounding = partial(rounded, kind=scheme.activations, scale=scales.get(name))
            handles.append(
                linears[name].register_forward_pre_hook(lambda _, given, rounding=rounding: rounding(given[0]))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _int8_but_outliers(X: Tensor) -> Tensor:
    """X: (…, T, in), in float16 first, as bitsandbytes has it."""
    values = X.half()
    outlying = values.abs() >= OUTLIER
    columns = outlying.any(dim=-2, keepdim=True)
    values = values.masked_fill(outlying, 0.0).float()
    step = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / LARGEST_INT8
    return torch.where(columns, X, torch.round(values / step).mul_(step).to(X.dtype))
