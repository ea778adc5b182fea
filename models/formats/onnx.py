"""ONNX with weights of 4 or 8 bits, or as factors, for ONNX Runtime: `model.onnx`, `model.onnx_data`, the tokenizer.

A linear is a `MatMulNBits`: `<name>.codes` uint8 (out, blocks, block·bits/8), the first code in the lowest bits;
`<name>.scale` float32 (out, blocks); where asymmetric, `<name>.zero` uint8 (out, ⌈blocks·bits/8⌉). One scale a row is
written once for each block of 128. A linear that was factored is two `MatMul`s, by `<name>.right` (in, rank) and
`<name>.left` (rank, out) in the source's type; of linears that share the first, one has it. Everything is computed in
float32, activations too, so that a token costs the same alone and among others; weights that are not quantized stay in
the source's type on disk.

Keys and values go in and out (`past_key_values.0.key`, `present.0.key` and so on), named as optimum names them.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.files.safetensors_file import read as read_tensor
from models.formats.directory import without_private, write_companions, write_json, written_whole
from models.formats.fitness import refuse_torn_groups
from models.formats.onnx_graph import Blocks, Thin, graph_of, narrow
from models.formats.packing import pack, unpack
from models.progress import Notify
from models.streaming.frame import weightless
from models.weights.codes import Codes
from models.weights.factored import Factored
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import CompressionBug, ModelMalformed
from squeeze.steps.schemes import Scheme

FILE, DATA = "model.onnx", "model.onnx_data"
FALLBACK_CONTEXT = 2048  # tokens, where the config sets no bound
CHANNEL_BLOCK = 128  # of a linear with one scale a row
TYPES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises GroupSizeIndivisible where this format can't hold one of these layers."""
    refuse_torn_groups(list(sites), schemes)


def write(source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify) -> None:
    """Writes a directory that ONNX Runtime runs. The graph is exported without weights, which are then streamed in."""
    refuse(quantized.sites.values(), quantized.schemes)
    linears = {name: _written(site, quantized.schemes[name]) for name, site in quantized.sites.items()}
    plain = weightless(source.path, torch.float32)
    shared = {f"{name}.right": f"{one.basis}.right" for name, one in linears.items() if isinstance(one, Thin)}
    shared = {name: basis for name, basis in shared.items() if name != basis}
    model = graph_of(source.path, linears, _ties(source, plain.all_tied_weights_keys) | shared)
    contents = _Contents(source, quantized, linears, frozenset(name for name, _ in plain.named_parameters()))
    for name in tuple(model.graph.initializers):
        contents.fill(model.graph, name)

    def advance(_: object, place: ir.external_data.CallbackInfo) -> None:
        notify.advance(place.index + 1, place.total, "tensors")

    with written_whole(out) as partial:
        write_companions(source, partial)
        config = without_private(source.config)
        config.pop("torch_dtype", None)
        write_json(partial / "config.json", config | {"dtype": "float32"})
        write_json(partial / "genai_config.json", _genai_config(model.graph, plain.config))
        ir.save(model, partial / FILE, external_data=DATA, callback=advance)


def read(out: Path, module: str) -> Codes | Factored:
    """The codes or factors of one layer, from what `write` wrote."""
    graph = ir.load(out / FILE).graph
    left = graph.initializers.get(f"{module}.left.stored") or graph.initializers.get(f"{module}.left")
    if left is not None:
        return _factors(left)
    ((node, _),) = graph.initializers[f"{module}.codes"].uses()
    bits, size, columns = (node.attributes[name].as_int() for name in ("bits", "block_size", "K"))
    group = node.metadata_props["group"]

    def tensor(part: str) -> Tensor | None:
        value = graph.initializers.get(f"{module}.{part}")
        return None if value is None or value.const_value is None else torch.tensor(value.const_value.numpy())

    packed, scale, zero = tensor("codes"), tensor("scale"), tensor("zero")
    if packed is None or scale is None:
        raise ModelMalformed(f"{FILE} holds no codes of {module}")
    rows, count, _ = packed.shape
    codes = unpack(packed.view(rows, -1).view(torch.int32), bits, count * size)[:, :columns].contiguous()
    if zero is None:
        zeros = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack(torch.nn.functional.pad(zero, (0, -zero.shape[1] % 4)).view(torch.int32), bits, count)
    if group == "channel":
        return Codes(codes, scale[:, :1], zeros[:, :1], Scheme("int", bits, "channel", zero is None))
    return Codes(codes, scale, zeros, Scheme("int", bits, int(group), zero is None))


def _factors(left: ir.Value) -> Factored:
    """Of a linear whose second factor that is."""
    ((node, _),) = left.uses()
    if node.op_type == "Cast":
        ((node, _),) = node.outputs[0].uses()
    given = node.inputs[0]
    right = None if given is None else (given.producer() or node).inputs[1]
    if right is not None and right.const_value is None:
        right = (right.producer() or node).inputs[0]  # that was widened
    if right is None or right.const_value is None or left.const_value is None:
        raise ModelMalformed(f"{FILE} holds no two factors at {left.name}")
    first, second = (_tensor(one).T.contiguous() for one in (left.const_value, right.const_value))
    basis = str(right.name).removesuffix(".stored").removesuffix(".right")
    scheme = Scheme("factored", 8 * first.dtype.itemsize, "channel", rank=first.shape[1], basis=basis)
    return Factored(first, second, scheme)


def _tensor(value: ir.TensorProtocol) -> Tensor:
    """numpy has no bfloat16 of its own."""
    if value.dtype == ir.DataType.BFLOAT16:
        return torch.tensor(value.numpy().view("int16")).view(torch.bfloat16)
    return torch.tensor(value.numpy())


def _genai_config(graph: ir.Graph, config: Any) -> dict[str, Any]:
    """What onnxruntime-genai wants to know; `decoder` is its name for any model with such inputs and outputs."""
    inputs = [str(value.name) for value in graph.inputs]
    shape = next(value.shape for value in graph.inputs if value.name == "past_key_values.0.key")
    assert isinstance(shape, ir.Shape)
    end = config.eos_token_id
    first_end = (end[0] if isinstance(end, list) else end) or 0
    context = getattr(config, "max_position_embeddings", None) or FALLBACK_CONTEXT
    named = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": config.bos_token_id or 0,
            "eos_token_id": end if end is not None else 0,
            "pad_token_id": first_end if config.pad_token_id is None else config.pad_token_id,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": FILE,
                "hidden_size": config.hidden_size,
                "head_size": shape[3],
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": shape[1],
                "num_hidden_layers": sum(name.endswith(".key") for name in inputs),
                "inputs": named
                | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": False},
    }


class _Contents:
    """What each initializer of the graph holds, read when it is written."""

    def __init__(
        self,
        source: SourceModel,
        quantized: QuantizedModel,
        linears: Mapping[str, Blocks | Thin],
        parameters: frozenset[str],
    ) -> None:
        self.source, self.quantized, self.linears, self.parameters = source, quantized, linears, parameters
        self.changed = quantized.changed()

    def fill(self, graph: ir.Graph, name: str) -> None:
        module, _, leaf = name.rpartition(".")
        value = graph.initializers[name]
        if module in self.linears and leaf in ("codes", "scale", "zero"):
            _lazy(value, lambda: self._part(module, leaf))
            return
        if module in self.linears and leaf in ("left", "right"):
            self._fill_factor(graph, module, leaf)
            return
        if name not in self.parameters:
            return  # what the model computes, which the exporter filled in
        if name in self.changed:
            _lazy(value, lambda: read_tensor(self.changed[name]).float())
            return
        key = self.source.file_key(name)
        if key is None:
            raise CompressionBug(f"the graph asks for {name}, which the files do not have")
        stored = TYPES.get(self.source.entries[key].dtype)
        if stored is not None and len(value.shape or ()) > 1:
            _lazy(narrow(graph, name, stored), lambda: self.source.tensor(key))
        else:
            _lazy(value, lambda: self.source.tensor(key).to(torch.float32))

    def _fill_factor(self, graph: ir.Graph, module: str, leaf: str) -> None:
        name, stored = f"{module}.{leaf}", TYPES.get(self.quantized.dtype)
        value = graph.initializers[name] if stored is None else narrow(graph, name, stored)

        def make() -> Tensor:
            return self.quantized.part(module, leaf).T.contiguous()

        _lazy(value, make)

    def _part(self, module: str, leaf: str) -> Tensor:
        blocks = self.linears[module]
        assert isinstance(blocks, Blocks), "it has codes"
        part = self.quantized.part(module, leaf)
        if leaf == "codes":
            padding = blocks.count * blocks.size - blocks.columns
            padded = torch.nn.functional.pad(part, (0, padding), value=2 ** (blocks.bits - 1))
            words = pack(padded, blocks.bits)
            return words.view(torch.uint8).view(blocks.rows, blocks.count, -1)
        part = part.expand(-1, blocks.count) if blocks.group == "channel" else part
        if leaf == "scale":
            return part.contiguous()
        zeros = pack(part.contiguous(), blocks.bits).view(torch.uint8)
        return zeros[:, : -(-blocks.count * blocks.bits // 8)].contiguous()


def _lazy(value: ir.Value, make: Callable[[], Tensor]) -> None:
    dtype, shape, name = value.dtype, value.shape, str(value.name)
    assert dtype is not None and isinstance(shape, ir.Shape)
    value.const_value = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype, shape, name=name)


def _written(site: Site, scheme: Scheme) -> Blocks | Thin:
    if scheme.element == "factored":
        return Thin(site.rows, site.columns, scheme.rank, scheme.basis or site.name)
    size = scheme.group_size if isinstance(scheme.group_size, int) else CHANNEL_BLOCK
    return Blocks(site.rows, site.columns, scheme.bits, size, not scheme.symmetric, str(scheme.group_size))


def _ties(source: SourceModel, pairs: Mapping[str, str]) -> dict[str, str]:
    """Parameters that the files have under another's name alone. pairs: of which the model makes one where it can."""
    found = {}
    for target, partner in pairs.items():
        if source.file_key(target) is None:
            found[target] = partner
        elif source.file_key(partner) is None:
            found[partner] = target
    return found
