"""What each format can hold, and who loads it: facts that are known without looking at a model.

`models/formats/<name>.py` writes the format; this table lets the service refuse at submit what it could not write.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from squeeze.errors import FormatUnfit
from squeeze.names import Format
from squeeze.steps.compressing import Compress
from squeeze.steps.factoring import SVD
from squeeze.steps.finetuning import Adapters, QLoRA
from squeeze.steps.merging import Merge
from squeeze.steps.quantization import CODE_BITS, Grouped
from squeeze.steps.schemes import Activations, Element, Group, Scheme
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train


@dataclass(frozen=True)
class Held:
    """Schemes of one element that a format can hold."""

    element: Element
    bits: tuple[int, ...]
    group_sizes: tuple[Group, ...]
    asymmetric: bool = False
    activations: tuple[Activations | None, ...] = (None,)


@dataclass(frozen=True)
class Capacity:
    """What one format can hold. mixes: layers of several numbers of bits, where they have no zero points.

    held: empty where it holds no weights of a model, but what was learned beside them.
    """

    held: tuple[Held, ...]
    consumers: tuple[str, ...]
    kv_cache: bool = False
    mixes: bool = False


PLAIN: tuple[Format, ...] = ("safetensors", "safetensors-zst")  # that hold weights, whatever was done to them
FACTORED: tuple[Format, ...] = ("onnx",)  # that hold both factors of a linear
OF_ANY_FAMILY: tuple[Format, ...] = ("peft", "safetensors-zst")  # that the engine knows
GROUPS: tuple[Group, ...] = (32, 64, 128, "channel")
CAPACITIES: dict[Format, Capacity] = {
    "compressed-tensors": Capacity(
        held=(
            Held("int", (2, 3, 4, 8), GROUPS, asymmetric=True),
            Held("int", (8,), ("channel",), activations=("int8",)),
            Held("float8", (8,), ("channel", "tensor"), activations=(None, "float8", "float8-static")),
            Held("float4", (4,), (16, 32)),
        ),
        consumers=("transformers", "vllm"),
        kv_cache=True,
        mixes=True,
    ),
    "gptq": Capacity(
        held=(Held("int", (2, 3, 4, 8), GROUPS, asymmetric=True),),
        consumers=("transformers", "gptqmodel", "vllm"),
    ),
    "awq": Capacity(
        held=(Held("int", (4,), (32, 64, 128), asymmetric=True),),
        consumers=("transformers", "vllm"),
    ),
    "bitsandbytes": Capacity(
        held=(Held("nf4", (4,), (64,)), Held("int", (8,), ("channel",), activations=("llm-int8",))),
        consumers=("transformers",),
    ),
    "safetensors": Capacity(
        held=(
            Held("bfloat16", (16,), ("channel",)),
            Held("float16", (16,), ("channel",)),
            Held("dense", (16, 32, 64), ("channel",)),
            Held("factored", (16, 32, 64), ("channel",)),  # multiplied out
        ),
        consumers=("transformers", "vllm"),
    ),
    "safetensors-zst": Capacity(held=(Held("dense", (16, 32, 64), ("channel",)),), consumers=("transformers", "vllm")),
    "gguf": Capacity(
        held=(
            Held("ggml", (2, 3, 4, 5, 6, 8), (16, 32), asymmetric=True),
            Held("int", (4,), GROUPS, asymmetric=True),
            Held("int", (8,), GROUPS),
            Held("bfloat16", (16,), ("channel",)),
            Held("float16", (16,), ("channel",)),
        ),
        consumers=("llama.cpp",),
    ),
    "onnx": Capacity(
        held=(Held("int", (4, 8), GROUPS, asymmetric=True), Held("factored", (16, 32, 64), ("channel",))),
        consumers=("onnxruntime",),
    ),
    "peft": Capacity(held=(), consumers=("peft",)),
}


def holders(scheme: Scheme) -> tuple[Format, ...]:
    """The formats that can hold a scheme, the most widely loaded first."""
    return tuple(name for name in CAPACITIES if not misfit(name, scheme))


def misfit(name: Format, scheme: Scheme) -> tuple[str, object, tuple[object, ...]] | None:
    """What of a scheme a format can't hold: the field of the step, its value, what would do. None: it can hold it."""
    found: tuple[str, object, tuple[object, ...]] | None = None
    for held in CAPACITIES[name].held:
        if held.element != scheme.element or scheme.activations not in held.activations:
            continue
        found = None
        for field, value, fits in (
            ("bits", scheme.bits, held.bits),
            ("group_size", scheme.group_size, held.group_sizes),
            ("symmetric", scheme.symmetric, (True, False) if held.asymmetric else (True,)),
        ):
            if value not in fits:
                found = (field, value, fits)
                break
        if found is None:
            return None
    return found or ("method", scheme.element, tuple(dict.fromkeys(held.element for held in CAPACITIES[name].held)))


def candidates(step: Grouped, formats: Sequence[Format]) -> tuple[int, ...]:
    """The numbers of bits that a layer may get where the step allots them: those that all these formats hold."""
    schemes = (Scheme("int", bits, step.group_size, step.symmetric) for bits in CODE_BITS)
    return tuple(scheme.bits for scheme in schemes if not any(misfit(name, scheme) for name in formats))


def refuse_unfit(steps: Sequence[object], formats: Sequence[Format]) -> None:
    """Raises FormatUnfit, naming the parameter and what would do, where a format can't hold what a step makes."""
    if isinstance(steps[-1], Train):
        factored = any(isinstance(step, SVD) for step in steps[:-1])
        _refuse_untrained(steps[-1], len(steps) - 1, [name for name in formats if not (factored and name in FACTORED)])
    if isinstance(steps[-1], Merge | Slim) and (unfit := [name for name in formats if name not in steps[-1].formats]):
        raise FormatUnfit(
            f"{unfit[0]} can't hold what {steps[-1].method} makes, a plain model in 16 bits. Take safetensors, or add "
            "a step that quantizes.",
            param="formats",
        )
    for number, step in enumerate(steps):
        if not isinstance(step, Compress) or step is not steps[-1]:  # what another goes on with is in no format
            continue
        for name in formats:
            if step.scales_cache and not CAPACITIES[name].kv_cache:
                able = ", ".join(one for one, capacity in CAPACITIES.items() if capacity.kv_cache)
                raise FormatUnfit(
                    f"{name} can't hold scales of a key/value cache; {able} can. Leave `kv_cache` or {name} out.",
                    param=f"steps.{number}.kv_cache",
                )
            if name == "gguf" and any(map(_zeroes, steps)):
                _refuse_shifted(number, step.scheme())
            if isinstance(step, Grouped) and step.bits == "auto":
                _refuse_unmixed(number, step, name)
            reason = misfit(name, step.scheme())
            if reason is None:
                continue
            field, value, fits = reason
            if field not in type(step).model_fields or field == "method":
                able = ", ".join(holders(step.scheme())) or "no format"
                raise FormatUnfit(
                    f"{name} can't hold what {step.method} makes; {able} can. Change `formats`.", param="formats"
                )
            raise FormatUnfit(
                f"{name} can't hold {field}={value}; it holds {', '.join(map(str, fits))}. "
                f"Change the step or leave {name} out of `formats`.",
                param=f"steps.{number}.{field}",
            )


def _refuse_shifted(number: int, scheme: Scheme) -> None:
    if scheme.element == "int" and not scheme.symmetric:
        raise FormatUnfit(
            "gguf rounds the offset that stands for a zero point, so that zeros would not be zero: set symmetric to "
            "true, or leave gguf out.",
            param=f"steps.{number}.symmetric",
        )


def _zeroes(step: object) -> bool:
    return isinstance(step, Compress) and step.zeroed > 0


def _refuse_untrained(step: Train, number: int, formats: Sequence[Format]) -> None:
    """Raises FormatUnfit where a job that ends with training is to be written as what that does not make."""
    for name in formats:
        if name == "peft" and name not in step.formats:
            raise FormatUnfit(
                f"peft holds adapters, and {step.method} trains the model's own weights. Take safetensors.",
                param="formats",
            )
        if isinstance(step, Adapters) and not step.mergeable and name != "peft":
            raise FormatUnfit(
                f"{name} can't hold what {step.method} learns, which can't be merged into weights. Take peft.",
                param="formats",
            )
        if name == "safetensors" and name not in step.formats:
            raise FormatUnfit(
                "safetensors holds the merged model, and this step does not merge. Set `merge` to true, or leave "
                "safetensors out of `formats`.",
                param=f"steps.{number}.merge",
            )
        if name == "gptq" and isinstance(step, QLoRA) and name not in step.formats:
            raise FormatUnfit(
                f"gptq would hold what the adapter stands beside, and that is {step.base}, which is rounded anew "
                "whenever it is loaded. Set `base` to gptq, or leave gptq out of `formats`.",
                param=f"steps.{number}.base",
            )
        if name not in ("peft", "safetensors", *step.writable):
            raise FormatUnfit(
                f"{name} can't hold what {step.method} makes; peft holds an adapter, safetensors a whole model. "
                "Change `formats`, or add a step that quantizes.",
                param="formats",
            )
    if "peft" in formats and "gptq" in step.formats and "gptq" not in formats:
        raise FormatUnfit(
            "the adapter goes with the weights as this job rounds them, which gptq alone would hold: add gptq to "
            "`formats`, or leave `formats` out.",
            param="formats",
        )


def _refuse_unmixed(number: int, step: Grouped, name: Format) -> None:
    """Raises FormatUnfit where a format can't hold layers of several numbers of bits side by side."""
    if not CAPACITIES[name].mixes:
        able = ", ".join(one for one, capacity in CAPACITIES.items() if capacity.mixes)
        raise FormatUnfit(
            f"{name} can't hold layers of several numbers of bits so that all who load it understand; {able} can. "
            f"Leave {name} out of `formats`, or take one number of bits for all.",
            param=f"steps.{number}.bits",
        )
    if not step.symmetric:
        raise FormatUnfit(
            f"{name} can't hold zero points where layers have several numbers of bits. Take `symmetric`: true.",
            param=f"steps.{number}.symmetric",
        )
