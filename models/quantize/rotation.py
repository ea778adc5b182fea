"""Rotations folded into a model's weights, so that outliers are spread and the rest rounds better.

Hidden states are multiplied by one orthogonal matrix throughout (R1 of SpinQuant, arXiv 2405.16406 §3.1; QuaRot, arXiv
2404.00456 §4), the values of each attention head by another (R2). Both cancel: whatever writes hidden states turns
them, whatever reads them turns them back, and a norm that divides by the root mean square does not see it, once its
weights have moved into the linears behind it. The result is a plain model that computes the same function. What would
have to be turned while it runs (their R3 and R4) is left out.

The final norm's weights move into the head, so that it can't be the embedding any longer: a tied one is written twice.
Nothing is kept: tensors are turned as they are read, in float32, a slice at a time, and rounded to the type that they
are stored in.
"""

import re
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.quantize.hadamard import Rotation
from models.streaming.frame import Frame
from squeeze.errors import ModelMalformed
from squeeze.reports import report
from squeeze.shapes.architectures import refuse_unrotatable

ATTENTION_NORM, FEED_NORM = "input_layernorm", "post_attention_layernorm"
READERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), ATTENTION_NORM),
    # w1 and w3: an expert's; gate: the router.
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "gate", "shared_expert_gate"), FEED_NORM),
}
WRITERS = frozenset({"o_proj", "down_proj", "w2"})
VALUES = frozenset({"v_proj", "qkv_proj"})
ONE_PLUS = frozenset({"gemma"})  # norms that multiply by 1 + weight
BLOCK = re.compile(r"^(.*\.)?layers\.\d+\.")
SLICE_NUMBERS = 1 << 24  # of a tensor that is turned at once
SAMPLED_BLOCKS = 3
GROUP = 128


@dataclass(frozen=True)
class Rotated(SourceModel):
    """A source whose tensors read as those of the rotated model.

    inner: the source as it is. turned: the rotation of hidden states. values: that of a head's values.
    """

    inner: SourceModel = field(kw_only=True)
    turned: Rotation = field(kw_only=True)
    values: Rotation = field(kw_only=True)

    @classmethod
    def of(cls, source: SourceModel) -> "Rotated":
        refuse_unrotatable(source.config["model_type"], "rotation")
        config, entries = source.config, dict(source.entries)
        embedding = _embedding(source)
        if source.file_key("lm_head.weight") is None:
            entries["lm_head.weight"] = source.entries[embedding]
        own = {one.name: getattr(source, one.name) for one in fields(SourceModel)}
        size = int(config["hidden_size"])
        return cls(
            **own | {"entries": entries, "config": config | {"tie_word_embeddings": False}},
            inner=source,
            turned=Rotation(size),
            values=Rotation(int(config.get("head_dim") or size // int(config["num_attention_heads"]))),
        )

    def tensor(self, name: str) -> Tensor:
        head = name == self.file_key("lm_head.weight")
        tied = head and name not in self.inner.entries
        stored = self.inner.tensor(_embedding(self.inner) if tied else name)
        block, (module, leaf) = BLOCK.match(name), name.split(".")[-2:]
        if head:
            return self._read(stored, self.inner.file_key(f"{self.row.prefix}.norm.weight"), stored.dtype)
        if block is None and module == "embed_tokens":
            return self._read(stored, None, stored.dtype)
        if module in (("norm",) if block is None else (ATTENTION_NORM, FEED_NORM)):
            return torch.full_like(stored, self._neutral)
        if block is None:
            return stored
        W = stored
        if module in VALUES:
            W = self._turn_values(W)
        if module == "o_proj" and leaf == "weight":
            W = self._turn_heads(W)
        if module in READERS and leaf == "weight":
            W = self._read(W, f"{block[0]}{READERS[module]}.weight", stored.dtype)
        elif module in WRITERS:
            W = self._write(W, stored.dtype)
        return W.to(stored.dtype)

    @property
    def untied_bytes(self) -> int:
        """By how much the model grows."""
        return self.weight_bytes - self.inner.weight_bytes

    @property
    def _neutral(self) -> float:
        return 0.0 if self.config["model_type"] in ONE_PLUS else 1.0

    def _read(self, W: Tensor, norm: str | None, dtype: torch.dtype) -> Tensor:
        """W diag(norm) Q in `dtype`. W: (out, in)."""
        weight = torch.ones(W.shape[-1])
        if norm is not None:
            weight = self.inner.tensor(norm).float() + (1.0 - self._neutral)
        result = torch.empty(W.shape, dtype=dtype)
        for part in _slices(len(W), W.shape[-1]):
            result[part] = self.turned.apply(W[part].float() * weight)
        return result

    def _write(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """Qᵀ W in `dtype`. W: (out, in), or a bias (out,)."""
        if W.dim() == 1:
            return self.turned.apply(W.float()).to(dtype)
        result = torch.empty(W.shape, dtype=dtype)
        for part in _slices(W.shape[1], len(W)):
            result[:, part] = self.turned.apply(W[:, part].float().T).T
        return result

    def _turn_values(self, W: Tensor) -> Tensor:
        """(I ⊗ Rᵀ) W in float32, over the rows that make values: the last ones, where one linear makes queries and
        keys too.
        """
        heads = int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])
        result = W.float()
        values = result[-heads * self.values.size :]
        columns = values.reshape(heads, self.values.size, -1)  # a bias has one column
        values.copy_(self.values.apply(columns.mT).mT.reshape(values.shape))
        return result

    def _turn_heads(self, W: Tensor) -> Tensor:
        """W (I ⊗ R) in float32."""
        return self.values.apply(W.float().view(len(W), -1, self.values.size)).view(W.shape)


def told(rotated: Rotated, frame: Frame, result: Frame) -> report.Rotation:
    """What the rotation did, for the report. frame, result: of the model as it is and rotated."""
    picked = sorted({n * (frame.count - 1) // max(1, SAMPLED_BLOCKS - 1) for n in range(SAMPLED_BLOCKS)})
    keys = [frame.source.file_key(f"{site.name}.weight") for n in picked for site in frame.sites(n)]
    peaks = [_peak([one.source.tensor(key) for key in keys if key]) for one in (frame, result)]
    return report.Rotation(
        kind="hadamard",
        hidden_states=rotated.turned.kind,
        values=rotated.values.kind,
        untied_bytes=rotated.untied_bytes,
        peak_before=peaks[0],
        peak_after=peaks[1],
    )


def _peak(weights: list[Tensor]) -> float:
    """Mean over groups of 128 neighbours of (largest magnitude / root mean square)²."""
    total, count = 0.0, 0
    for W in weights:
        groups = W.float().flatten()[: W.numel() // GROUP * GROUP].view(-1, GROUP)
        ratio = groups.square().amax(dim=1) / groups.square().mean(dim=1).clamp_min(1e-30)
        total, count = total + float(ratio.sum(dtype=torch.float64)), count + len(ratio)
    return total / max(count, 1)


def _embedding(source: SourceModel) -> str:
    key = source.file_key(f"{source.row.prefix}.embed_tokens.weight")
    if key is None:
        raise ModelMalformed("the weights hold no embed_tokens.weight, which the config says there is")
    return key


def _slices(count: int, width: int) -> list[slice]:
    step = max(1, SLICE_NUMBERS // max(width, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
