"""Scales for keys and values that engines cache in 8 bits (E4M3): found while calibrating, applied while evaluating.

What attention hands to its cache are keys after their rotation, and values. A stand-in for the cache looks at them, or
rounds them, on the way; so nothing here knows an architecture. Which modules have such scales is the rule of
compressed-tensors, from which transformers and vLLM read them: `<attention>.k_scale` and `.v_scale`, one number each,
the largest magnitude over 448.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import Tensor, nn

from models.streaming.frame import Frame
from models.streaming.team import Team
from models.weights.float_codes import LARGEST_E4M3, exact_in, to_e4m3
from squeeze.errors import FormatUnfit

KEY, VALUE = "k_scale", "v_scale"
CACHE = "past_key_values"  # attention's argument

Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def refuse_unknown_attention(frame: Frame) -> None:
    """Raises FormatUnfit where a block has no attention whose cache the consumers know scales of."""
    config = frame.model.config.get_text_config(decoder=True)
    told = getattr(config, "num_key_value_heads", None) is not None  # without it transformers won't load the scales
    for index in range(frame.count):
        if not told or not attentions(frame.skeleton(index)):
            raise FormatUnfit(
                f"in {config.model_type} models consumers find no attention that they could give scales of its cache: "
                "they look for projections of its own for keys and values, and for `num_key_value_heads` in "
                "config.json; leave `kv_cache` out",
                param="kv_cache",
            )


def attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a block whose caches can have scales, by their names inside of it."""
    return {
        name: module
        for name, module in block.named_modules()
        if is_cached_attention_module(module) and hasattr(module, "k_proj") and hasattr(module, "v_proj")
    }


class Reach:
    """How far keys and values reach, by attention and channel: (heads · head size,) float32 each."""

    def __init__(self) -> None:
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def widen(self, team: Team) -> None:
        """To what any process of a team saw."""
        for held in (self.keys, self.values):
            for name in sorted(held):
                team.largest(held[name])

    def scales(self, name: str, produced: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The two scales of one attention, (1,) in the model's dtype.

        produced: by the name of a module inside of the block, by what its output rows were multiplied since; the
        values' projection may be among them.
        """
        values = self.values[name]
        later = produced.get(f"{name}.v_proj")
        if later is not None:
            values = values * later
        return {KEY: _scale(self.keys[name], dtype), VALUE: _scale(values, dtype)}


@contextmanager
def observed(block: nn.Module, reach: Reach) -> Iterator[None]:
    """Meanwhile, whatever the block's attention would cache is noted."""

    def note(held: dict[str, Tensor], name: str, states: Tensor) -> None:
        found = states.detach().float().abs().amax(dim=(0, 2)).flatten()  # (B, H, T, D) -> (H · D,)
        held[name] = torch.maximum(held[name], found) if name in held else found

    def passing(name: str) -> Pass:
        def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            note(reach.keys, name, keys)
            note(reach.values, name, values)
            return keys, values

        return look

    with _passing_through({module: passing(name) for name, module in attentions(block).items()}):
        yield


@contextmanager
def rounded(block: nn.Module, scales: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Meanwhile, the block's attention reads keys and values as a cache of 8 bits would hand them back."""

    def passing(name: str) -> Pass:
        def round_both(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return _round(keys, scales[name][KEY]), _round(values, scales[name][VALUE])

        return round_both

    with _passing_through({module: passing(name) for name, module in attentions(block).items() if name in scales}):
        yield


class _StandIn:
    """What attention takes for its cache; nothing is kept."""

    def __init__(self, passing: Pass) -> None:
        self._pass = passing

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._pass(keys, values)


@contextmanager
def _passing_through(passes: Mapping[nn.Module, Pass]) -> Iterator[None]:
    def hook(passing: Pass) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs | {CACHE: _StandIn(passing)}

        return put

    handles = [module.register_forward_pre_hook(hook(passing), with_kwargs=True) for module, passing in passes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scale(reach: Tensor, dtype: torch.dtype) -> Tensor:
    return exact_in((reach.max() / LARGEST_E4M3).reshape(1), dtype).to(dtype)


def _round(states: Tensor, scale: Tensor) -> Tensor:
    factor = scale.float()
    return (to_e4m3(states.float() / factor).float() * factor).to(states.dtype)
