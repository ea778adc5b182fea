"""The architecture table: where the decoder blocks of each supported family lie, and what its files call things.

A family whose blocks follow the usual pattern (`model.layers`, linears inside) needs only its name here; a row says
what differs. Which families exist at all is `squeeze.shapes.architectures`, which is importable without torch.
"""

from dataclasses import dataclass, replace
from typing import Any

from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, ModelMalformed, ModelUnsafe
from squeeze.shapes.architectures import ARCHITECTURES, refuse_classifier


@dataclass(frozen=True)
class Architecture:
    """blocks: dotted path of the list of decoder blocks in the causal model. prefix: of the base model.

    head_alias: the module name that checkpoint files use for the output head where it isn't `lm_head`.
    in_tuples: the model takes a block's output as the first entry of a tuple.
    renamed: parts of module names that differ: as transformers has them, as files have them.
    expert: what files call the gate, up and down linears of one expert of a mixture.
    kept: last names of linears that decide where tokens go; they stay in 16 bits.
    unpacked: transformers' own code looks at the weights of quantized linears, so that they can't stay packed there.
    """

    blocks: str = "model.layers"
    prefix: str = "model"
    head_alias: str | None = None
    in_tuples: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    kept: tuple[str, ...] = ()
    unpacked: bool = False

    def file_name(self, name: str) -> str:
        """The name that files have for what transformers calls `name`."""
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name


USUAL = Architecture()
OLD = Architecture(blocks="transformer.h", prefix="transformer", in_tuples=True)
TABLE: dict[str, Architecture] = {
    "bloom": OLD,
    "codegen": OLD,
    "falcon": replace(OLD, unpacked=True),
    "gpt2": Architecture(blocks="transformer.h", prefix="transformer"),
    "gpt_bigcode": Architecture(blocks="transformer.h", prefix="transformer", unpacked=True),
    "gpt_neox": Architecture(blocks="gpt_neox.layers", prefix="gpt_neox", head_alias="embed_out"),
    "gptj": OLD,
    "mixtral": Architecture(renamed=((".mlp.", ".block_sparse_moe."),), expert=("w1", "w3", "w2")),
    "mpt": Architecture(blocks="transformer.blocks", prefix="transformer", in_tuples=True),
    "opt": Architecture(blocks="model.decoder.layers"),
    "qwen2_moe": Architecture(kept=("shared_expert_gate",)),
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
    refuse_classifier(config.get("architectures"))
    if config.get("quantization_config"):
        raise ModelAlreadyCompressed(
            "the model's weights are quantized already; name the 16-bit model that it was made from"
        )
    return TABLE.get(model_type, USUAL)
