"""A model's skeleton: everything around its decoder blocks runs as its own code, the blocks are loaded one at a time.

The blocks of the transformers model are hollowed out. A forward pass then computes what lies before the blocks
(embeddings, positions, masks) and what each block would have been called with; a second one, in which the last hollow
block hands out given hidden states, computes what lies after them (norm, head, scaling, soft-capping). No architecture
needs code of its own for that. Experts of a mixture are unfused, so that each of their linears is a module.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from models.files.architectures import TABLE, USUAL
from models.files.checkpoint import SourceModel
from models.files.safetensors_file import DTYPE_NAMES, Entry
from models.quoting import quoted
from models.streaming.experts import Expert, unfuse
from models.weights.finite import all_finite
from models.weights.plain import saturated
from models.weights.quantized import Site
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, ModelMalformed, NotFinite
from squeeze.shapes.model import Shape, shape_of

COMPUTABLE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class _EmptyNowhere(TorchFunctionMode):
    """Lets `torch.empty`, which weights begin as, allocate nothing; buffers begin as numbers and stay real.

    `init_empty_weights` drops a weight once it is there, and the experts of one layer may be larger than the memory.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


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

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        frame = self._frame[0]
        hidden = frame._visit(self._index, hidden, args, kwargs)
        return (hidden,) if frame.source.row.in_tuples else hidden


Call = tuple[tuple[Any, ...], dict[str, Any]]


class Frame:
    """The skeleton of one source model.

    dtype: of the computation. device: where blocks and batches run. stored: a type that weights are rounded to before
    they take that of the computation, for the model that a cast makes; None: as they are.
    """

    def __init__(
        self, source: SourceModel, dtype: torch.dtype, device: torch.device, stored: torch.dtype | None = None
    ) -> None:
        self.source, self.dtype, self.device, self.stored = source, dtype, device, stored
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
        self._sites = [self._linears(n) for n in range(len(self._skeletons))]
        self._exact = exact_names(self.model)
        self._calls: list[Call] | None = None
        self._first: Tensor | None = None
        self._injected: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of decoder blocks."""
        return len(self._skeletons)

    @property
    def parameters(self) -> int:
        """Of the whole model, as the config describes it; what is tied counts once."""
        around: int = sum(one.numel() for name, one in self.model.named_parameters() if name not in self._ties)
        return around + sum(one.numel() for block in self._skeletons for one in block.parameters())

    def shape(self, ignored: Sequence[str] = ()) -> Shape:
        """As `SourceModel.shape`, from the config alone."""
        stored = self.model.config.dtype
        return shape_of(self.source.config, self.sides(), DTYPE_NAMES.get(stored, "BF16"), ignored)

    def sides(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by their names; what is tied counts once."""
        tensors = {name: tuple(one.shape) for name, one in self.model.named_parameters() if name not in self._ties}
        for index, block in enumerate(self._skeletons):
            own = block.named_parameters(prefix=f"{self.blocks_path}.{index}")
            tensors |= {name: tuple(one.shape) for name, one in own}
        return tensors

    @property
    def ties(self) -> dict[str, str]:
        """Parameters that are others' by the config, by their names: the head by the embedding's."""
        return dict(self._ties)

    @property
    def max_positions(self) -> int | None:
        """Tokens that a sequence may have; None where the config sets no bound."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return int(positions) if positions else None

    def sites(self, index: int) -> list[Site]:
        """The linears of a block, in definition order; what routes tokens to experts is not one of them."""
        return [site for site, _ in self._sites[index].values()]

    def module(self, site: Site) -> nn.Module:
        """The module of a site; its weight exists only while the block is loaded."""
        index = int(site.name.removeprefix(f"{self.blocks_path}.").partition(".")[0])
        return self._sites[index][site.name][1]

    def experts(self, index: int) -> dict[str, tuple[str, ...]]:
        """The experts of a block by name, each with its sites' names in the order gate, up, down; empty where none.

        Each sees the tokens that the router sends there, in one batch perhaps none: its linears then run on (0, in).
        """
        names = {id(module): name for name, (_, module) in self._sites[index].items()}
        found: dict[str, tuple[str, ...]] = {}
        for module in self._skeletons[index].modules():
            if isinstance(module, Expert):
                linears = tuple(names[id(module.get_submodule(name))] for name in module.names)
                found[linears[0].rpartition(".")[0]] = linears
        return found

    def put(self, site: Site, module: nn.Module) -> None:
        """Has a module stand where a linear stood, before weights are loaded."""
        index = int(site.name.removeprefix(f"{self.blocks_path}.").partition(".")[0])
        block, linear = self._skeletons[index], self._sites[index][site.name][1]
        block.set_submodule(next(place for place, one in block.named_modules() if one is linear), module)

    def skeleton(self, index: int) -> nn.Module:
        """One decoder block as it is between times: without weights."""
        return self._skeletons[index]

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

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all its blocks, and all weights loaded; at exit they are freed, and the blocks hollow again.

        It runs like any model of transformers; its experts stay unfused.
        """
        parent, _, leaf = self.blocks_path.rpartition(".")
        try:
            yield self.loaded()
        finally:
            _empty(self.model)
            setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._hollows))

    def loaded(self) -> Any:
        """As `whole`, of a frame that is for nothing else: the model keeps its blocks and its weights."""
        parent, _, leaf = self.blocks_path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._skeletons))
        self._fill(self.model, "")
        return self.model

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

    def _linears(self, index: int) -> dict[str, tuple[Site, nn.Module]]:
        row = self.source.row
        found: dict[str, tuple[Site, nn.Module]] = {}
        for path, module in self._skeletons[index].named_modules():
            name = row.file_name(f"{self.blocks_path}.{index}.{path}")
            if path.rpartition(".")[2] in row.kept:
                continue
            if isinstance(module, nn.Linear):
                found[name] = Site(name, module.out_features, module.in_features, transposed=False), module
            elif isinstance(module, Conv1D):
                found[name] = Site(name, module.nf, module.nx, transposed=True), module
        return found

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
                if not all_finite(tensor):
                    raise NotFinite(f"tensor {key} holds NaN or infinity; the model is damaged at its source")
                exact = self._exact.search(name)
                if self.stored is not None and not exact:
                    tensor = saturated(tensor, self.stored)
                tensor = tensor.to(torch.float32 if exact else self.dtype)
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
    """The model that `config.json` describes, without weights; its buffers are real, its experts unfused."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.use_cache = False
        # Where soft-capping of the attention is not in torch's kernel, transformers has it in plain code alone.
        attention = "sdpa" if AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa else "eager"
        with init_empty_weights(include_buffers=False), _EmptyNowhere():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
            unfuse(model, TABLE.get(config.model_type, USUAL))
    except Exception as error:
        raise ModelMalformed(
            f"transformers can't build the model that config.json describes: {quoted(error, 400)}"
        ) from error
    return model.eval().requires_grad_(False)


def exact_names(model: Any) -> re.Pattern[str]:
    """Of the tensors that transformers keeps in float32 whatever the model's type: what corrects a router's choice."""
    names = [re.escape(name) for name in model._keep_in_fp32_modules_strict or ()]
    return re.compile(rf"(^|\.)({'|'.join(names)})(\.|$)" if names else r"(?!)")


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
