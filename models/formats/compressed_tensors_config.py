"""How a compressed-tensors directory tells in `config.json` what is stored in which way."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig

from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import FormatUnfit
from squeeze.steps.schemes import Activations, Element, Group, Scheme

# The names that consumers know each layout by.
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
SEVERAL = "mixed-precision"

NUMBERED = re.compile(r"(.*?\.)(\d+)(\..*)")  # a module of a numbered block


def layout_name(scheme: Scheme) -> str:
    """What compressed-tensors calls the layout of a scheme."""
    if scheme.element == "float8":
        return FLOATS
    if scheme.element == "float4":
        return MXFP4 if scheme.group_size == 32 else NVFP4
    return INTEGERS if scheme.activations else PACKED


def quantization_config(quantized: QuantizedModel, ignore: Sequence[str]) -> dict[str, Any]:
    """The library's own description; it validates what it is given. One group for all that is stored in one way."""
    names: dict[Scheme, list[str]] = {}
    for name in quantized.sites:
        names.setdefault(quantized.schemes[name], []).append(name)
    transposed = any(site.transposed for site in quantized.sites.values())
    groups = {}
    for number, (scheme, members) in enumerate(names.items()):
        sites = [quantized.sites[name] for name in members]
        everywhere = ["Conv1D" if transposed else "Linear"]
        groups[f"group_{number}"] = {
            "targets": everywhere if len(names) == 1 else targets(members),
            "format": layout_name(scheme),
            "weights": _weights(scheme, sites),
            "input_activations": _input_activations(scheme.activations),
        }
    layouts = {group["format"] for group in groups.values()}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": groups,
            "format": layouts.pop() if len(layouts) == 1 else SEVERAL,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": _kv_cache_scheme(quantized),
        }
    )
    plain: dict[str, Any] = json.loads(config.model_dump_json())
    if _unpacks_while_loading(quantized, transposed):
        if len(names) > 1:
            raise FormatUnfit(
                f"transformers can't load {', '.join(map(layout_name, names))} side by side into a "
                f"{str(quantized.dtype).removeprefix('torch.')} model; use one method for all layers",
                param="formats",
            )
        plain["dequantize"] = True
    return plain


def targets(names: Sequence[str]) -> list[str]:
    """Anchored patterns that match these modules and no others; one for all blocks, since readers try each in turn."""
    blocks: dict[tuple[str, str], list[str]] = {}
    found = []
    for name in names:
        numbered = NUMBERED.fullmatch(name)
        if numbered is None:
            found.append(f"re:^{re.escape(name)}$")
        else:
            blocks.setdefault((numbered[1], numbered[3]), []).append(numbered[2])
    found += [f"re:^{re.escape(head)}({'|'.join(n)}){re.escape(tail)}$" for (head, tail), n in blocks.items()]
    return found


def entry_of(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The group of a written config that a module belongs to."""
    groups: list[dict[str, Any]] = list(config["config_groups"].values())
    if len(groups) == 1:
        return groups[0]
    return next(
        group
        for group in groups
        if any(re.match(target.removeprefix("re:"), module) is not None for target in group["targets"])
    )


def rounds_while_running(config: Mapping[str, Any]) -> bool:
    """Whether consumers round activations, or what they cache, as they run: each in its own arithmetic, so that their
    results differ in more than the order of sums.
    """
    groups = config.get("config_groups", {}).values()
    return bool(config.get("kv_cache_scheme")) or any(group.get("input_activations") for group in groups)


def scheme_of(entry: Mapping[str, Any], columns: int, groups: int) -> Scheme:
    """The scheme that a group of a written config stands for. columns, groups: of one layer."""
    weights, given = entry["weights"], entry.get("input_activations")
    kind, bits = weights["type"], weights["num_bits"]
    element: Element = "int" if kind == "int" else "float8" if bits == 8 else "float4"
    activations: Activations | None = None
    if given:
        activations = "int8" if kind == "int" else "float8" if given["dynamic"] else "float8-static"
    return Scheme(element, bits, _group(weights, columns, groups), weights["symmetric"], activations)


def _group(weights: Mapping[str, Any], columns: int, groups: int) -> Group:
    strategy = weights["strategy"]
    if strategy == "tensor":
        return "tensor"
    if strategy == "block":
        return columns // groups if groups > 1 else "channel"
    return weights["group_size"] or "channel"


def _weights(scheme: Scheme, sites: Sequence[Site]) -> dict[str, Any]:
    if scheme.element == "float4":
        block = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": scheme.group_size}
        if layout_name(scheme) == MXFP4:
            return block | {"strategy": "group", "scale_dtype": "torch.uint8"}
        return block | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    group: dict[str, Any]
    if scheme.element == "int" and sites[0].transposed:
        longest = max(scheme.columns(site.columns) for site in sites)
        group = {"strategy": "block", "block_structure": [longest, 1]}  # a block may reach past a shorter layer's end
    elif isinstance(scheme.group_size, str):
        group = {"strategy": scheme.group_size}
    else:
        group = {"strategy": "group", "group_size": scheme.group_size}
    kind = "int" if scheme.element == "int" else "float"
    return {"num_bits": scheme.bits, "type": kind, "symmetric": scheme.symmetric, **group}


def _input_activations(activations: Activations | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    kind = {"num_bits": 8, "type": "int" if activations == "int8" else "float", "symmetric": True}
    if activations == "float8-static":
        return kind | {"strategy": "tensor", "dynamic": False}
    return kind | {"strategy": "token", "dynamic": True}


def _kv_cache_scheme(quantized: QuantizedModel) -> dict[str, Any] | None:
    if not quantized.step.scales_cache:
        return None
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def _unpacks_while_loading(quantized: QuantizedModel, transposed: bool) -> bool:
    """Whether transformers 5.23 has to be told to unpack while it loads, which it would do at the first forward anyway:
    it can't keep these packed (zero points: "MISMATCH"; blocks: Conv1D is no Linear; four-bit floats, which unpack to
    bfloat16: "expected m1 and m2 to have the same dtype" in a model of another type).
    """
    schemes = quantized.schemes.values()
    other_type = quantized.dtype != torch.bfloat16 and any(one.element == "float4" for one in schemes)
    return transposed or other_type or not all(one.symmetric for one in schemes)
