"""Adapters in peft's layout: its names, and whether one can be merged, as far as its settings tell; no torch."""

import re
from collections.abc import Mapping
from typing import Any

from squeeze.errors import ModelMalformed
from squeeze.names import OWN_ID

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in its files
MERGED = ("LORA", "IA3")
# With these the base's own weights stay as they are; with others the adapter goes with changed ones.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def refuse_unmergeable(config: Mapping[str, Any], label: str, base: str, *, same_base: bool) -> str:
    """The kind of an adapter, as peft calls it. Raises ModelMalformed where it can't be merged into the base.

    base: the name of the base, or of its directory. same_base: the user says that it goes with that.
    """
    kind = str(config.get("peft_type"))
    if kind not in MERGED:
        raise ModelMalformed(
            f"{label} is a {kind} adapter, of which no weights can be merged; {' and '.join(MERGED)} can"
            + (". What it learned stands before the input" if "PROMPT" in kind or "PREFIX" in kind else "")
        )
    if config.get("modules_to_save"):
        raise ModelMalformed(
            f"{label} trained whole layers beside its adapter (modules_to_save {config['modules_to_save']}). Merge it "
            "into its base with peft's merge_and_unload, and name the whole model"
        )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ModelMalformed(
            f"{label} trained biases too. Merge it into its base with peft's merge_and_unload, and name the whole model"
        )
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and (start not in PLAIN_STARTS or config.get("loftq_config")):
        raise ModelMalformed(
            f"{label} began with init_lora_weights {start!r}, which changes the base's weights, and goes with those. "
            "Convert it with peft's path_initial_model_for_weight_conversion, or name its merged model"
        )
    theirs = str(config.get("base_model_name_or_path") or "").partition("@")[0]
    ours = base.partition("@")[0]
    if not same_base and _is_public(theirs) and _is_public(ours) and theirs.casefold() != ours.casefold():
        raise ModelMalformed(
            f"{label} is an adapter of {theirs}, and the job's model is {ours}. Name {theirs} as the job's model, or, "
            "where both have the same weights, set `same_base` to true"
        )
    return kind


def _is_public(name: str) -> bool:
    """Whether it says which model that is wherever it stands."""
    return bool(HUB_NAME.fullmatch(name) or OWN_ID.match(name))
