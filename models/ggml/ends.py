"""Embedding and output head as llama.cpp's files hold them beside K-quants: in blocks of 32 with 8 bits.

They are half of a small model. On the bundled model 8 bits cost a divergence of 0.00003 nats, 6 bits ten times that.
"""

from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from models.files.checkpoint import SourceModel
from models.ggml.encoder import decode_bytes, encode
from models.ggml.types import TYPES, Name
from models.streaming.frame import Frame

KIND: Name = "q8_0"


@dataclass(frozen=True)
class RoundedEnds(SourceModel):
    """A source whose embedding and head read as they will be stored. ends: their names in the files. inner: the source
    as it is.
    """

    inner: SourceModel = field(kw_only=True)
    ends: frozenset[str] = frozenset()

    @classmethod
    def of(cls, frame: Frame) -> "RoundedEnds":
        source = frame.source
        ends = {key for name in end_names(frame.model) if (key := source.file_key(f"{name}.weight")) is not None}
        own = {one.name: getattr(source, one.name) for one in fields(SourceModel)}
        return cls(**own, inner=source, ends=frozenset(ends))

    def tensor(self, name: str) -> Tensor:
        stored = self.inner.tensor(name)
        if name not in self.ends or not fits(stored.shape[-1]):
            return stored
        return decode_bytes(encode(stored, KIND), KIND).to(stored.dtype)


def end_names(model: nn.Module) -> list[str]:
    """Modules of a causal model that map tokens to hidden states and back."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    return [name for name, module in model.named_modules() if id(module) in ends]


def fits(columns: int) -> bool:
    return columns % TYPES[KIND].columns == 0
