"""(IA)³ (arXiv 2205.05638): a learned factor for every key, value and input of a feed-forward part's last layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import IA3Config
from torch import Tensor

from models.finetune import peft_adapter
from models.finetune.peft_adapter import adapter_of, write
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.steps.finetuning import IA3

__all__ = ["Merged", "adapter_of", "finetune", "sites_of", "write"]

# Last names of the layers that make keys and values, alone or with the queries.
KEYS_AND_VALUES = frozenset(
    {"k_proj", "v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"},
)
# And of those that a feed-forward part ends with; GPT-2 and StarCoder call the attention's last layer the same.
LAST_OF_FEED_FORWARD = frozenset({"down_proj", "dense_4h_to_h", "fc_out", "fc2"})


def sites_of(frame: Frame, step: IA3) -> list[Site]:
    """The layers that get factors, in the model's order; raises ModelMalformed where there are none of a pattern."""
    return peft_adapter.chosen(
        frame,
        step.target_modules,
        lambda site: peft_adapter.last(site.name) in KEYS_AND_VALUES or _ends_feed_forward(site.name),
    )


def finetune(model: Any, step: IA3, names: Sequence[str]) -> Any:  # noqa: ARG001 - the names say it all
    """The model with factors, at first 1, of what the named linears make; of the last layer of a feed-forward part, of
    what it reads.
    """
    inputs = [name for name in names if _ends_feed_forward(name)]
    told = peft_adapter.short(model, names)
    lasts = {peft_adapter.last(name) for name in inputs}
    if lasts & {peft_adapter.last(name) for name in names if name not in inputs}:
        told = sorted(names)  # the last name of one that is scaled before is that of one that is scaled behind
    config = IA3Config(
        target_modules=told,
        feedforward_modules=inputs if told == sorted(names) else sorted(lasts),
        fan_in_fan_out=peft_adapter.transposed(model, names),
        task_type="CAUSAL_LM",
    )
    return peft_adapter.wrapped(model, config)


class Merged(peft_adapter.Written):
    """The weights of a model multiplied by the factors in an adapter's directory."""

    def __init__(self, adapter: Path) -> None:
        super().__init__(adapter, ".ia3_l")

    def weight(self, module: str, W: Tensor, *, transposed: bool, rows: slice = slice(None)) -> Tensor:
        """Rows or columns of W times their factors, float32, in the layout of W. W: (out, in), or (in, out) where
        transposed; of it the `rows`.
        """
        factors = self.tensor(f"{module}.ia3_l")  # (out, 1) or (1, in)
        factors = factors.t() if transposed else factors
        return (W.float() * (factors if len(factors) == 1 else factors[rows])).contiguous()

    def bias(self, module: str, b: Tensor) -> Tensor:
        """b times the factors of the outputs, float32. b: (out,)."""
        factors = self.tensor(f"{module}.ia3_l")
        return b.float() * factors.view(-1) if factors.shape[1] == 1 else b.float()


def _ends_feed_forward(name: str) -> bool:
    return peft_adapter.last(name) in LAST_OF_FEED_FORWARD or name.endswith("mlp.c_proj")
