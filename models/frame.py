"""A model's skeleton: everything around its decoder blocks runs as its own code, the blocks are loaded one at a time.

The blocks of the transformers model are hollowed out. A forward pass then computes what lies before the blocks
(embeddings, positions, masks) and what each block would have been called with; a second one, in which the last hollow
block hands out given hidden states, computes what lies after them (norm, head, scaling, soft-capping). No architecture
needs code of its own for that.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from models.checkpoint import SourceModel
from models.quantized import Site
from squeeze.errors import ArchitectureUnsupported, ModelMalformed, NotFinite


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
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
        self.model.eval().requires_grad_(False)
        self.blocks_path = row.blocks
        try:
            blocks = self.model.get_submodule(row.blocks)
        except AttributeError as error:
            raise ArchitectureUnsupported(f"{config.model_type}: no list of decoder blocks at {row.blocks}") from error
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
        """Loads every parameter and persistent buffer of a module, tied ones once."""
        for name, target in [*module.named_parameters(), *module.named_buffers()]:
            full = f"{prefix}.{name}" if prefix else name
            key = self.source.file_key(full)
            owner = module.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            if key is None:
                if leaf in owner._buffers:  # computed by the model itself, or not persistent
                    owner._buffers[leaf] = target.to(self.device)
                    continue
                if self._is_tied(full):
                    continue
                raise ModelMalformed(f"the weights hold no tensor {full}, which the config says there is")
            tensor = self.source.tensor(key)
            if tensor.shape != target.shape:
                raise ModelMalformed(
                    f"tensor {key} has shape {tuple(tensor.shape)}, but the config asks for {tuple(target.shape)}"
                )
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise NotFinite(f"tensor {key} holds NaN or infinity; the model is damaged at its source")
                tensor = tensor.to(self.dtype)
            if leaf in owner._buffers:
                owner._buffers[leaf] = tensor.to(self.device)
            else:
                owner._parameters[leaf] = nn.Parameter(tensor.to(self.device), requires_grad=False)
        if module is self.model:
            self._tie_head()

    def _is_tied(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        return bool(self.model.config.tie_word_embeddings) and head is not None and name == self._head_name()

    def _head_name(self) -> str:
        head = self.model.get_output_embeddings()
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is head)

    def _tie_head(self) -> None:
        head = self.model.get_output_embeddings()
        if self.model.config.tie_word_embeddings and head is not None:
            head.weight = self.model.get_input_embeddings().weight


def _empty(module: nn.Module) -> None:
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
