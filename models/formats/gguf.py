"""GGUF, one file with weights, settings and tokenizer: what llama.cpp, Ollama and LM Studio run.

Integer codes of 4 and 8 bits in groups of whole 32s stand in it as they are: symmetric ones as Q4_0 and Q8_0, 4-bit
ones with zero points as Q4_1, whose offset (zero point · scale) is rounded to float16. ggml blocks that a method made
stand in it byte by byte. What is not quantized keeps the type of the source; norms and biases are float32, as
llama.cpp wants them.

The file is written tensor by tensor, through the `gguf` package.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.files.safetensors_file import read as read_tensor
from models.formats.directory import skeleton_of, written_whole
from models.formats.gguf_families import EXPERT, FAMILIES, Family, Heads, config_of, family_of, heads_of, tensor_name
from models.formats.gguf_metadata import extra_tensors, write_settings
from models.formats.gguf_vocabulary import refuse_vocabulary, write_vocabulary
from models.ggml.blocks import Blocks, scheme_of
from models.ggml.encoder import encode
from models.ggml.ends import KIND, fits
from models.ggml.layout import Grid, pack
from models.ggml.types import TYPES, Name, number_of, row_bytes
from models.progress import Notify
from models.weights.codes import Codes, Encoded
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import CompressionBug, FormatUnfit
from squeeze.shapes.model import COMPUTED
from squeeze.steps.schemes import Scheme

FILE = "model.gguf"
GROUP = 32  # columns of a scale in the types that hold integer codes
FLOATS: dict[torch.dtype, Name] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Kept in float32 by llama.cpp too: learned positions, and what sends tokens to experts.
EXACT, ROUTER = "position_embd", "ffn_gate_inp"
ENDS = ("token_embd.weight", "output.weight")
GUESSED = 1024  # general.file_type of a mixture that has no name


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises FormatUnfit where this format can't hold one of these layers."""
    for site in sites:
        name = type_of(schemes[site.name], site)
        if site.columns % (1 if name in FLOATS.values() else TYPES[name].columns):
            raise FormatUnfit(
                f"gguf keeps {name} weights in blocks of {TYPES[name].columns} inputs, which do not divide the "
                f"{site.columns} inputs of {site.name}; name it in `ignore`, or ask for another format",
                param="formats",
            )


def refuse_source(source: SourceModel) -> None:
    """Raises FormatUnfit where llama.cpp computes or tokenizes otherwise than transformers; looks at settings alone."""
    family_of(config_of(source))
    refuse_vocabulary(source.path)


def type_of(scheme: Scheme, site: Site) -> Name:
    """The ggml type that holds a layer's codes; raises FormatUnfit where none does."""
    if scheme.element == "ggml":
        return cast(Name, scheme.ggml)
    if scheme.element in ("float16", "bfloat16"):
        return "f16" if scheme.element == "float16" else "bf16"
    names: dict[tuple[int, bool], Name] = {(4, True): "q4_0", (4, False): "q4_1", (8, True): "q8_0"}
    name = names.get((scheme.bits, scheme.symmetric)) if scheme.element == "int" and not scheme.activations else None
    if name is None:
        raise FormatUnfit(
            f"gguf holds integer codes of 4 bits, and symmetric ones of 8, not what {site.name} is stored as; the "
            "method `kquant` makes files of 2 to 6 bits for llama.cpp",
            param="formats",
        )
    return name


def write(source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify) -> None:
    """Writes a directory with one file that llama.cpp loads."""
    refuse(quantized.sites.values(), quantized.schemes)
    config = config_of(source)
    family = family_of(config)
    pieces = list(_pieces(source, quantized, config, family))
    with written_whole(out) as partial:
        writer = GGUFWriter(partial / FILE, family.name)
        write_settings(writer, config, family)
        for difference in write_vocabulary(writer, source.path, config.vocab_size):
            notify.event("warning", difference)
        writer.add_file_type(_file_type(quantized))
        for piece in pieces:
            writer.add_tensor_info(
                piece.name,
                piece.byte_shape,
                np.dtype(np.uint8),
                piece.size_bytes,
                GGMLQuantizationType(number_of(piece.kind)),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done_bytes, total_bytes = 0, sum(piece.size_bytes for piece in pieces)
        for piece in pieces:
            made = piece.make()
            if tuple(made.shape) != piece.byte_shape or made.dtype != torch.uint8:
                raise CompressionBug(f"tensor {piece.name} did not come out as it was announced")
            writer.write_tensor_data(made.contiguous().numpy())
            done_bytes += piece.size_bytes
            notify.advance(done_bytes, total_bytes, "bytes")
        writer.close()


def read(out: Path, module: str) -> Encoded:
    """The stored weights of one layer, from what `write` wrote, in the order of rows that transformers has."""
    reader = GGUFReader(out / FILE)

    def setting(key: str) -> Any:
        return reader.fields[f"{arch}.{key}"].contents()

    arch = reader.fields["general.architecture"].contents()
    model_arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    name = gguf.get_tensor_name_map(model_arch, setting("block_count")).get_name(module)
    entry = next(tensor for tensor in reader.tensors if tensor.name == f"{name}.weight")
    heads = Heads(setting("attention.head_count"), setting("attention.head_count_kv"), setting("attention.key_length"))
    packed = torch.from_numpy(entry.data.copy()).view(torch.uint8)
    packed = packed.view(packed.shape[0], -1)
    order = _order_in_file(arch, module, heads)
    if order is not None:
        packed = torch.empty_like(packed).index_copy_(0, order, packed)
    return Blocks(packed, scheme_of(cast(Name, entry.tensor_type.name.lower())))


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file. byte_shape: its bytes, in which a row's stand last. make: returns them, uint8."""

    name: str
    kind: Name
    byte_shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return int(torch.Size(self.byte_shape).numel())


def _pieces(source: SourceModel, quantized: QuantizedModel, config: Any, family: Family) -> Iterator[_Piece]:
    """All tensors in the model's order, under llama.cpp's names."""
    for name, tensor in extra_tensors(config).items():
        yield _plain(name, "f32", tuple(tensor.shape), partial(torch.clone, tensor))
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    written: set[str] = set()
    mixtures: dict[str, list[_Piece]] = {}
    for parameter in skeleton_of(source).names:
        key = source.file_key(parameter)
        if COMPUTED.search(parameter):
            continue
        if key is None and family.own_head and parameter == "lm_head.weight":
            key = source.module_key(_embedding(source), "weight")
        elif key is None or key in written:
            continue  # tied: llama.cpp takes the embedding for the head
        written.add(key)
        target = tensor_name(names, parameter, source, config)
        piece = _piece(parameter, key, target, source, quantized, config, family)
        if EXPERT.search(parameter) is None:
            yield piece
        else:
            mixtures.setdefault(target, []).append(piece)
    for experts in mixtures.values():
        yield _stacked(experts)


def _piece(
    parameter: str,
    key: str,
    target: str,
    source: SourceModel,
    quantized: QuantizedModel,
    config: Any,
    family: Family,
) -> _Piece:
    """One parameter, quantized or as it is. key: its name in the source's files."""
    module, _, leaf = parameter.rpartition(".")
    order = family.order(module, heads_of(config))
    site = quantized.sites.get(source.row.file_name(module)) if leaf == "weight" else None
    if site is not None:
        return _quantized(target, quantized, site, order)
    changed = quantized.changed().get(parameter)
    entry = changed or source.entries[key]
    transposed = leaf == "weight" and _is_conv1d(config, module)
    shape = tuple(reversed(entry.shape)) if transposed else entry.shape
    shift = family.norm_shift if len(shape) == 1 and leaf == "weight" else 0.0
    kind: Name = "f32" if len(shape) == 1 or target.startswith(EXACT) or ROUTER in target else FLOATS[entry.dtype]
    if target in ENDS and quantized.step.scheme().element == "ggml" and fits(shape[-1]):
        kind = KIND

    def make() -> Tensor:
        tensor = source.tensor(key) if changed is None else read_tensor(changed)
        tensor = tensor.t() if transposed else tensor
        tensor = tensor if order is None else tensor[order]
        return tensor.float() + shift if shift else tensor

    return _plain(target, kind, shape, make)


def _stacked(experts: list[_Piece]) -> _Piece:
    """The same linear of all experts of a layer, as one tensor (experts, rows, columns)."""
    first = experts[0]
    if any((each.kind, each.byte_shape) != (first.kind, first.byte_shape) for each in experts):
        raise FormatUnfit(
            f"llama.cpp keeps the experts of a layer in one tensor, so that all of {first.name} must be stored alike",
            param="formats",
        )

    def make() -> Tensor:
        return torch.stack([each.make() for each in experts])

    return _Piece(first.name, first.kind, (len(experts), *first.byte_shape), make)


def _plain(name: str, kind: Name, shape: tuple[int, ...], make: Callable[[], Tensor]) -> _Piece:
    def encoded() -> Tensor:
        tensor = make()
        return encode(tensor.reshape(-1, tensor.shape[-1]), kind).view(byte_shape)

    byte_shape = (*shape[:-1], row_bytes(kind, shape[-1]))
    return _Piece(name, kind, byte_shape, encoded)


def _quantized(name: str, quantized: QuantizedModel, site: Site, order: Tensor | None) -> _Piece:
    kind = type_of(quantized.schemes[site.name], site)

    def make() -> Tensor:
        packed = to_bytes(quantized.codes(site.name), site)
        return packed if order is None else packed[order]

    return _Piece(name, kind, (site.rows, row_bytes(kind, site.columns)), make)


def to_bytes(encoded: Encoded, site: Site) -> Tensor:
    """The blocks that hold a layer's codes, (rows, bytes) uint8."""
    name = type_of(encoded.scheme, site)
    if isinstance(encoded, Blocks):
        return encoded.blocks
    if not isinstance(encoded, Codes):
        return encode(encoded.dequantize(torch.float32), name)
    kind = TYPES[name]
    repeats = encoded.group_size // GROUP
    scale = encoded.scale.repeat_interleave(repeats, dim=1)  # (rows, columns / 32)
    if not kind.offset:
        return pack(encoded.codes, Grid(scale, None, None, None), kind)
    shift = scale * encoded.zero.float().repeat_interleave(repeats, dim=1)
    return pack(encoded.codes, Grid(scale, shift.to(torch.float16).float(), None, None), kind)


def _embedding(source: SourceModel) -> str:
    prefix = source.row.prefix
    return {"gpt_neox": f"{prefix}.embed_in"}.get(source.config["model_type"], f"{prefix}.embed_tokens")


def _is_conv1d(config: Any, module: str) -> bool:
    """GPT-2 keeps the weights of its linears (in, out)."""
    return config.model_type == "gpt2" and module.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")


def _order_in_file(arch: str, module: str, heads: Heads) -> Tensor | None:
    family = next(family for family in FAMILIES.values() if family.name == arch)
    return family.order(module, heads)


def _file_type(quantized: QuantizedModel) -> int:
    """llama.cpp's number of the kind of file: of what most weights are."""
    counts: dict[Name, int] = {}
    for name, site in quantized.sites.items():
        kind = type_of(quantized.schemes[name], site)
        counts[kind] = counts.get(kind, 0) + site.rows * site.columns
    most = max(counts, key=lambda kind: counts[kind], default=None)
    numbers = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q2_k": 10, "q6_k": 18, "bf16": 32}
    return numbers.get(most or "", GUESSED)
