"""LoRA (arXiv 2106.09685), with rsLoRA, DoRA and PiSSA: which layers get an adapter, how it is written and merged."""

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from models.finetune import peft_adapter
from models.finetune.fused import fuse
from models.finetune.peft_adapter import adapter_of
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.steps.finetuning import LoRA, LowRank

# gptqmodel 7.6 keeps an error of its own import for ever, and with it all frames that stand open then. peft would
# import it while it wraps a model, which would stay in memory for as long as the process lives. In a thread of its own
# no frame of ours is open.
with ThreadPoolExecutor(1) as thread:
    thread.submit(import_module, "gptqmodel").result()

__all__ = ["Merged", "adapter_of", "beside", "finetune", "sites_of", "write"]


def sites_of(frame: Frame, step: LowRank) -> list[Site]:
    """The layers that get an adapter, in the model's order; raises ModelMalformed where there are none of a pattern."""
    return peft_adapter.chosen(frame, step.target_modules, lambda _: True)


def finetune(model: Any, step: LoRA, names: Sequence[str]) -> Any:
    """The model with an adapter beside each of the named linears, in float32; nothing else of it learns.

    With init `pissa` the model's own weights give their largest singular vectors to the adapters.
    """
    return beside(model, step, names, "pissa" if step.init == "pissa" else True)


def beside(model: Any, step: LowRank, names: Sequence[str], init: bool | str) -> Any:
    """As `finetune`. init: what peft calls it."""
    config = LoraConfig(
        r=step.rank,
        lora_alpha=step.alpha,
        lora_dropout=step.dropout,
        use_rslora=step.rslora,
        use_dora=step.dora,
        init_lora_weights=init,
        target_modules=peft_adapter.short(model, names),
        fan_in_fan_out=peft_adapter.transposed(model, names),
        bias="none",
        task_type="CAUSAL_LM",
    )
    learner = peft_adapter.wrapped(model, config)
    fuse(learner)
    return learner


def write(model: Any, step: LoRA, initial: Mapping[str, Tensor], out: Path, base: str, revision: str | None) -> None:
    """Writes the adapter in peft's layout into a directory. initial: it as it began. base: what the config calls the
    model that it goes with.

    One that began at singular vectors is written as what it became less what it was, side by side in twice the rank, so
    that it goes with the model's own weights (as peft's `path_initial_model_for_weight_conversion`).
    """
    tensors = adapter_of(model)
    changes: dict[str, Any] = {"base_model_name_or_path": base, "revision": revision, "init_lora_weights": True}
    if step.init == "pissa":
        for name, tensor in tensors.items():
            ends = [tensor, -initial[name] if ".lora_B." in name else initial[name]]
            tensors[name] = torch.cat(ends, dim=1 if ".lora_B." in name else 0)
        changes |= {"r": 2 * step.rank, "lora_alpha": step.alpha * (math.sqrt(2) if step.rslora else 2)}
    peft_adapter.write_adapter(model, tensors, changes, out)


class Merged(peft_adapter.Written):
    """The weights of a model with what an adapter's directory adds to them."""

    def __init__(self, adapter: Path) -> None:
        super().__init__(adapter, ".lora_A.weight")

    def weight(self, module: str, W: Tensor, *, transposed: bool, rows: slice = slice(None)) -> Tensor:
        """W + scale·B·A, float32, in the layout of W. W: (out, in), or (in, out) where transposed; of it the `rows`.

        With DoRA each row then gets the length that was learned (arXiv 2402.09353, equation 5); one that is transposed
        has to be whole for that.
        """
        A, B = (self.tensor(f"{module}.lora_{letter}.weight") for letter in "AB")
        scale, own = self._scale(module, len(A)), slice(None) if transposed else rows  # of the outputs
        V = W.t() if transposed else W
        V = V.float() + scale * (B[own] @ (A[:, rows] if transposed else A))  # (out, in)
        if self.has(f"{module}.lora_magnitude_vector"):
            m = self.tensor(f"{module}.lora_magnitude_vector")[own]  # (out,)
            V = V * (m / torch.linalg.norm(V, dim=1)).unsqueeze(1)
        merged: Tensor = V.t() if transposed else V
        return merged.contiguous()

    def _scale(self, module: str, rank: int) -> float:
        """Of one layer, whose rank and `alpha` may be its own: peft names those layers by patterns for their ends."""
        alpha = self.config["lora_alpha"]
        for pattern, own in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))
