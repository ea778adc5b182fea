"""A model's skeleton: everything around its decoder blocks runs as its own code, the blocks are loaded one at a time.

The blocks of the transformers model are hollowed out. A forward pass then computes what lies before the blocks
(embeddings, positions, masks) and what each block would have been called with; a second one, in which the last hollow
block hands out given hidden states, computes what lies after them (norm, head, scaling, soft-capping). No architecture
needs code of its own for that.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from models.checkpoint import SourceModel
from models.quantized import Site
from models.quoting import quoted
from models.safetensors_file import Entry
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, ModelMalformed, NotFinite

COMPUTABLE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class _BlocksReached(Exception):
    """Stops a forward pass at the last hollow block."""


class _Hollow(nn.Module):
    """Stands where a decoder block was: notes what it is called with, passes hidden states on."""

    def __init__(self, frame: "Frame", index: int, block: nn.Module) -> None:
        super().__init__()
        # Models pick masks by attributes of the block (`attention_type`, `layer_type`): keep the plain ones.
        for name, value in vars(block).items():
            if isinstance(value, str | int | float | bool) and name != "training" and not name.startswith("_"):
                setattr(self, name, value)
        self._frame, self._index = [frame], index  # a list hides the frame from nn.Module's registry

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._frame[0]._visit(self._index, hidden, args, kwargs)


Call = tuple[tuple[Any, ...], dict[str, Any]]


class Frame:
    """The skeleton of one source model.

    dtype: of the computation. device: where blocks and batches run.
    """

    def __init__(self, source: SourceModel, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        row = source.row
        self.model = weightless(source.path, dtype)
        self._ties: dict[str, str] = dict(self.model.all_tied_weights_keys)  # the head to the embedding
        self.blocks_path = row.blocks
        try:
            blocks = self.model.get_submodule(row.blocks)
        except AttributeError as error:
            model_type = self.model.config.model_type
            raise ArchitectureUnsupported(f"{model_type}: no list of decoder blocks at {row.blocks}") from error
        self._skeletons = list(cast(nn.ModuleList, blocks))
        if not self._skeletons:
            raise ModelMalformed("config.json says that the model has no decoder blocks")
        self._hollows = [_Hollow(self, n, block) for n, block in enumerate(self._skeletons)]
        parent, _, leaf = row.blocks.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._hollows))
        self._calls: list[Call] | None = None
        self._first: Tensor | None = None
        self._injected: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of decoder blocks."""
        return len(self._skeletons)

    @property
    def max_positions(self) -> int | None:
        """Tokens that a sequence may have; None where the config sets no bound."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return int(positions) if positions else None

    def sites(self, index: int) -> list[Site]:
        """The linears of a block, in definition order."""
        found = []
        for name, module in self._skeletons[index].named_modules():
            full = f"{self.blocks_path}.{index}.{name}"
            if isinstance(module, nn.Linear):
                found.append(Site(full, module.out_features, module.in_features, transposed=False))
            elif isinstance(module, Conv1D):
                found.append(Site(full, module.nf, module.nx, transposed=True))
        return found

    def module(self, site: Site) -> nn.Module:
        """The module of a site; its weight exists only while the block is loaded."""
        index, _, inner = site.name.removeprefix(f"{self.blocks_path}.").partition(".")
        return self._skeletons[int(index)].get_submodule(inner)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One decoder block with its weights loaded; they are freed at exit."""
        block = self._skeletons[index]
        self._fill(block, f"{self.blocks_path}.{index}")
        try:
            yield block
        finally:
            _empty(block)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Embeddings, final norm and head with their weights loaded; they are freed at exit."""
        self._fill(self.model, "")
        try:
            yield
        finally:
            _empty(self.model)

    def refuse_misfits(self) -> None:
        """Compares what the config asks for with the headers of the weight files, before any tensor is read."""
        blocks = [(block, f"{self.blocks_path}.{n}") for n, block in enumerate(self._skeletons)]
        for module, prefix in [(self.model, ""), *blocks]:
            for name, owner, leaf in _stored(module, prefix):
                parameter = owner._parameters.get(leaf)
                if parameter is None:  # a buffer, which the model computes where no file has it
                    continue
                key = self.source.file_key(name)
                if key is not None:
                    _refuse_misfit(key, self.source.entries[key], tuple(parameter.shape))
                elif not self._is_tied(name):
                    raise ModelMalformed(f"the weights hold no tensor {name}, which the config says there is")

    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """What comes before the blocks. ids: (B, T) int64.

        Returns the first block's hidden states (B, T, C) and, for each block, the other arguments of its call.
        Needs `surroundings`.
        """
        self._calls, self._first = [], None
        with suppress(_BlocksReached):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        calls, first = self._calls, self._first
        self._calls = self._first = None
        if first is None or len(calls) != self.count:
            raise ArchitectureUnsupported("the model's forward pass does not go through its decoder blocks one by one")
        return first, calls

    def leave(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What comes after the blocks. hidden: (B, T, C), the last block's output. Returns logits (B, T, V).

        ids are only there to make the model's own forward run; token-wise parts see nothing of them.
        Needs `surroundings`.
        """
        self._injected = hidden.to(self.device)
        try:
            return cast(Tensor, self.model(input_ids=ids.to(self.device), use_cache=False).logits)
        finally:
            self._injected = None

    def _visit(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        last = index == self.count - 1
        if self._calls is None:
            return self._injected if last and self._injected is not None else hidden
        if index == 0:
            self._first = hidden
        self._calls.append((args, kwargs))
        if last:
            raise _BlocksReached
        return hidden

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Loads every tensor of a module that the files have; `refuse_misfits` said that they have what it takes."""
        for name, owner, leaf in _stored(module, prefix):
            key = self.source.file_key(name)
            if key is None:  # tied to one that the files have, or computed by the model itself
                continue
            tensor = self.source.tensor(key)
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise NotFinite(f"tensor {key} holds NaN or infinity; the model is damaged at its source")
                tensor = tensor.to(self.dtype)
            tensor = tensor.to(self.device)
            if leaf in owner._buffers:
                owner._buffers[leaf] = tensor
            else:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        for owner in module.modules():
            for leaf, buffer in owner._buffers.items():
                owner._buffers[leaf] = buffer if buffer is None else buffer.to(self.device)
        if module is self.model:
            self._tie()

    def _tie(self) -> None:
        """As transformers does: whichever the files have serves as both, and two that differ stay two."""
        for target, source in self._ties.items():
            held = [name for name in (source, target) if self.source.file_key(name)]
            if len(held) == 2 and not torch.equal(self.model.get_parameter(source), self.model.get_parameter(target)):
                continue
            shared = self.model.get_parameter(held[0])
            for name in (source, target):
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, shared)

    def _is_tied(self, name: str) -> bool:
        """The files have another parameter that serves as this one."""
        partners = [*(s for t, s in self._ties.items() if t == name), *(t for t, s in self._ties.items() if s == name)]
        return any(self.source.file_key(partner) for partner in partners)


def weightless(path: Path, dtype: torch.dtype) -> Any:
    """The model that `config.json` describes, without weights; its buffers are real."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:
        raise ModelMalformed(
            f"transformers can't build the model that config.json describes: {quoted(error, 400)}"
        ) from error
    return model.eval().requires_grad_(False)


def _refuse_misfit(key: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.dtype not in COMPUTABLE:
        raise ModelAlreadyCompressed(
            f"tensor {key} is stored as {str(entry.dtype).removeprefix('torch.')}, so the weights are quantized "
            "already; name the 16-bit model that they were made from"
        )
    if entry.shape != shape:
        raise ModelMalformed(f"tensor {key} has shape {entry.shape}, but the config asks for {shape}")


def _stored(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
    """What files hold of a module: the full name of each parameter and persistent buffer, its owner, its last name."""
    for path, owner in module.named_modules(prefix=prefix):
        for leaf in [*owner._parameters, *owner._buffers]:
            absent = owner._parameters.get(leaf) is None and owner._buffers.get(leaf) is None
            if not absent and leaf not in owner._non_persistent_buffers_set:
                yield (f"{path}.{leaf}" if path else leaf), owner, leaf


def _empty(module: nn.Module) -> None:
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
