"""The architecture table: where the decoder blocks of each supported family lie.

A family whose blocks follow the usual pattern (`model.layers`, linears inside) needs only its name here; a row says
what differs. Which families exist at all is `squeeze.architectures`, which is importable without torch.
"""

from dataclasses import dataclass
from typing import Any

from squeeze.architectures import ARCHITECTURES
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, ModelMalformed, ModelUnsafe


@dataclass(frozen=True)
class Architecture:
    """blocks: dotted path of the list of decoder blocks in the causal model. prefix: of the base model.

    head_alias: the module name that checkpoint files use for the output head where it isn't `lm_head`.
    """

    blocks: str = "model.layers"
    prefix: str = "model"
    head_alias: str | None = None


USUAL = Architecture()
TABLE: dict[str, Architecture] = {
    "opt": Architecture(blocks="model.decoder.layers"),
    "gpt2": Architecture(blocks="transformer.h", prefix="transformer"),
    "gpt_neox": Architecture(blocks="gpt_neox.layers", prefix="gpt_neox", head_alias="embed_out"),
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The row for a model's `config.json`; raises where the model can't be compressed, saying what is missing."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelMalformed("config.json names no model_type, so nobody can tell what kind of model this is")
    if model_type not in ARCHITECTURES:
        if "auto_map" in config:
            raise ModelUnsafe(
                f"the model ({model_type}) needs Python code from its repository, which is never run here; "
                f"supported without it: {', '.join(sorted(ARCHITECTURES))}"
            )
        raise ArchitectureUnsupported(
            f"model_type {model_type!r} is not in the architecture table: where its decoder blocks lie is not known. "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("quantization_config"):
        raise ModelAlreadyCompressed(
            "the model's weights are quantized already; name the 16-bit model that it was made from"
        )
    return TABLE.get(model_type, USUAL)
