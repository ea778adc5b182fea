"""The graph of a model for ONNX, its weights announced but not there: a model may be larger than memory.

Linears to quantize become `MatMulNBits` of ONNX Runtime's own operators (domain `com.microsoft`), those that were
factored two `MatMul`s. The others, and everything else, are what torch's exporter makes of the transformers model. Keys
and values of earlier tokens go in and out, under the names that optimum gives them.
"""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from models.streaming.frame import weightless

OPSET = 20
DOMAIN = "com.microsoft"
EXACT = 1  # accuracy_level: inputs are multiplied as float32
# Example sizes; all differ and none is 1, so that torch takes none for another or for a constant.
BATCH, TOKENS, PAST = 2, 5, 7
WRAPPED = "model."  # before the names of parameters in the exported graph


@dataclass(frozen=True)
class Blocks:
    """How a linear's codes lie: rows of `count` blocks of `size` codes of `bits` bits, each with a scale and, where
    `zeros`, a zero point. columns: inputs; the last block may reach past them. group: what the scheme says of groups.
    """

    rows: int
    columns: int
    bits: int
    size: int
    zeros: bool
    group: str

    @property
    def count(self) -> int:
        return -(-self.columns // self.size)


@dataclass(frozen=True)
class Thin:
    """A linear as two factors. basis: under whose name the one that the inputs meet first stands."""

    rows: int
    columns: int
    rank: int
    basis: str


class ThinLinear(nn.Module):
    """Takes the place of a linear: announces its factors, transposed, so that each is multiplied as it lies."""

    def __init__(self, thin: Thin, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.empty(thin.columns, thin.rank), requires_grad=False)
        self.left = nn.Parameter(torch.empty(thin.rank, thin.rows), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.right @ self.left
        return out if self.bias is None else out + self.bias


class BlockLinear(nn.Module):
    """Takes the place of a linear: announces its codes, and exports as `MatMulNBits`."""

    def __init__(self, blocks: Blocks, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.blocks = blocks
        shapes: dict[str, tuple[int, ...]] = {"codes": (blocks.rows, blocks.count, blocks.size * blocks.bits // 8)}
        if blocks.zeros:
            shapes["zero"] = (blocks.rows, -(-blocks.count * blocks.bits // 8))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False))
        self.scale = nn.Parameter(torch.empty(blocks.rows, blocks.count), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks
        names = ["codes", "scale", *(["zero"] if blocks.zeros else [])]
        attributes: dict[str, Any] = {
            "K": blocks.columns,
            "N": blocks.rows,
            "bits": blocks.bits,
            "block_size": blocks.size,
            "accuracy_level": EXACT,
        }
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MatMulNBits",
            [x, *(self.get_parameter(name) for name in names)],
            attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], blocks.rows),
            version=1,
            metadata_props={"group": blocks.group},
        )
        return out if self.bias is None else out + self.bias


class _Cached(nn.Module):
    """A causal model as a function of tensors alone."""

    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model, self.takes_positions = model, takes_positions

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor | None, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        extra = {"position_ids": positions} if self.takes_positions else {}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(past), use_cache=True, **extra
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def graph_of(path: Path, linears: Mapping[str, Blocks | Thin], ties: Mapping[str, str]) -> ir.Model:
    """The model that `config.json` describes, computing in float32.

    linears: by name, those to quantize or to write as factors. ties: parameters that are another one's, by name.
    Initializers have the names of the model's parameters; of a linear, `<name>.codes`, `.scale` and `.zero`, or `.left`
    and `.right`. What they hold is undefined, but for buffers.
    """
    model = weightless(path, torch.float32)
    for name, one in linears.items():
        bias = model.get_submodule(name).bias
        model.set_submodule(name, BlockLinear(one, bias) if isinstance(one, Blocks) else ThinLinear(one, bias))
    _announce(model)
    for target, source in ties.items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    heads = _heads(model)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask", *(["position_ids"] if takes_positions else [])]
    kv = [f"{n}.{part}" for n in range(len(heads)) for part in ("key", "value")]
    tokens, past = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 2: "past_sequence_length"}
    arguments = (
        torch.zeros(BATCH, TOKENS, dtype=torch.int64),
        torch.ones(BATCH, TOKENS + PAST, dtype=torch.int64),
        torch.arange(PAST, PAST + TOKENS).repeat(BATCH, 1) if takes_positions else None,
        [tuple(torch.zeros(BATCH, count, PAST, width) for count, width in each) for each in heads],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        program = torch.onnx.export(
            _Cached(model, takes_positions),
            arguments,
            dynamo=True,
            optimize=False,  # it would fold weights, which are not there
            verbose=False,
            opset_version=OPSET,
            input_names=[*names, *(f"past_key_values.{name}" for name in kv)],
            output_names=["logits", *(f"present.{name}" for name in kv)],
            dynamic_shapes=(
                tokens,
                {0: "batch_size", 1: "total_sequence_length"},
                tokens if takes_positions else None,
                [(past, past) for _ in heads],
            ),
        )
    assert program is not None
    exported = _cleaned(program.model)
    _tie(exported.graph, ties)
    return exported


def _tie(graph: ir.Graph, ties: Mapping[str, str]) -> None:
    """Leaves one initializer of every two that are the same."""
    for target, source in ties.items():
        if target in graph.initializers and source in graph.initializers:
            graph.initializers.pop(target).replace_all_uses_with(graph.initializers[source])
        elif target in graph.initializers:
            graph.initializers[target].name = source


def narrow(graph: ir.Graph, name: str, dtype: ir.DataType) -> ir.Value:
    """Has a float32 initializer stored in a 16-bit type; what uses it, or what was gathered from it, is widened."""
    wide = graph.initializers[name]
    stored = ir.Value(name=f"{name}.stored", shape=wide.shape, type=ir.TensorType(dtype))
    widened: ir.Value | None = None
    for node, place in tuple(wide.uses()):
        if node.op_type == "Gather" and place == 0:
            node.replace_input_with(place, stored)
            rows = node.outputs[0]
            rows.type = ir.TensorType(dtype)
            cast_node = _widening(rows)
            graph.insert_after(node, cast_node)
            rows.replace_all_uses_with(cast_node.outputs[0])
            cast_node.replace_input_with(0, rows)  # its own use went along
            continue
        if widened is None:
            cast_node = _widening(stored)
            widened = cast_node.outputs[0]
            graph.insert_before(graph[0], cast_node)
        node.replace_input_with(place, widened)
    graph.initializers.pop(name)
    graph.initializers[str(stored.name)] = stored
    return stored


def _widening(value: ir.Value) -> ir.Node:
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    node.outputs[0].name, node.outputs[0].shape = f"{value.name}.wide", value.shape
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node


def _announce(model: nn.Module) -> None:
    """Gives every parameter an address; memory that nobody writes to is not there."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                announced = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[leaf] = nn.Parameter(announced, requires_grad=False)


def _heads(model: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and their width of each layer's keys and values, found by calling the model without computing."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True).past_key_values
    return [
        ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
        for layer in cache.layers
    ]


def _cleaned(model: ir.Model) -> ir.Model:
    """Without the exporter's notes, which name files of this machine, and with the parameters' own names."""
    model.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = "squeeze", None
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        group = node.metadata_props.get("group")
        node.metadata_props.clear()
        node.doc_string = None
        if group is not None:
            node.metadata_props["group"] = group
        for value in node.outputs:
            value.metadata_props.clear()
    for name, value in tuple(model.graph.initializers.items()):
        value.metadata_props.clear()
        if name.startswith(WRAPPED):
            value.name = name.removeprefix(WRAPPED)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.opset_imports.setdefault(DOMAIN, 1)
    return model
