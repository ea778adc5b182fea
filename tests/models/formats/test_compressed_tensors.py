"""Layouts of compressed-tensors besides packed integers: their own library makes and reads the same bytes."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.files.checkpoint import SourceModel, open_model, read_config
from models.formats import layout
from models.formats.compressed_tensors_config import scheme_of, targets
from models.formats.fitness import stored_alike, torn_fusions
from models.progress import Silent
from models.quantize.problem import Problem
from models.streaming.block import method_of
from models.weights.codes import Encoded
from models.weights.float_codes import e2m1, to_e2m1
from models.weights.quantized import QuantizedModel, Site, block_file, tensors_of
from squeeze.errors import FormatUnfit, GroupSizeIndivisible
from squeeze.steps.quantization import FP8, MXFP4, NVFP4, RTN, Quantize, SmoothQuant
from squeeze.steps.schemes import Scheme
from tests.models.formats.test_consumers import logits
from tests.models.rounding import dequantized
from tests.models.tiny import gpt2, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS: list[Quantize] = [
    SmoothQuant(method="smoothquant"),
    FP8(method="fp8"),
    FP8(method="fp8", weight_scales="tensor"),
    FP8(method="fp8", activations="static"),
    FP8(method="fp8", activations="none"),
    MXFP4(method="mxfp4"),
    NVFP4(method="nvfp4"),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def stored(
    model: Path, work: Path, steps: dict[str, Quantize], default: Quantize
) -> tuple[SourceModel, QuantizedModel]:
    """A model whose linears are rounded without data, each by the step of the first ending that its name has."""
    source = open_model(model)
    transposed = source.config["model_type"] == "gpt2"
    sites: dict[str, Site] = {}
    schemes: dict[str, Scheme] = {}
    encoded: dict[str, Encoded] = {}
    changed: dict[str, Tensor] = {}
    for name in [key.removesuffix(".weight") for key in source.names() if ".layers." in key or ".h." in key]:
        if f"{name}.weight" not in source.names() or source.tensor(f"{name}.weight").dim() != 2:
            continue
        step = next((one for ending, one in steps.items() if name.endswith(ending)), default)
        weight = source.tensor(f"{name}.weight").float()
        weight = (weight.t() if transposed else weight).contiguous()
        rows, columns = weight.shape
        sites[name], schemes[name] = Site(name, rows, columns, transposed), step.scheme()
        encoded[name] = method_of(step).quantize(Problem(weight, None, step.scheme(), source.dtype), step).encoded
        if step.scheme().activations == "float8-static":
            changed[f"{name}.input_scale"] = torch.tensor([0.02]).to(source.dtype)
    work.mkdir()
    save_file(dict(tensors_of(encoded, changed)), block_file(work, 0))
    return source, QuantizedModel(work, default, sites, schemes, (), source.dtype)


def written(model: Path, room: Path, default: Quantize, **steps: Quantize) -> tuple[Path, QuantizedModel]:
    source, quantized = stored(model, room / "codes", steps, default)
    layout("compressed-tensors").write(source, quantized, room / "out", Silent())
    return room / "out", quantized


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    root = tmp_path_factory.mktemp("models")
    return {dtype: llama(root / str(dtype), dtype=dtype, num_hidden_layers=1) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_codes_come_back_as_they_were_and_the_library_reads_and_makes_the_same_bytes(
    models: dict[torch.dtype, Path], tmp_path: Path, step: Quantize, dtype: torch.dtype
) -> None:
    out, quantized = written(models[dtype], tmp_path, step)
    ours = load_file(out / "model.safetensors")
    config = QuantizationConfig.model_validate(
        {key: value for key, value in read_config(out)["quantization_config"].items() if key != "dequantize"}
    )
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)

    for name in quantized.sites:
        codes = quantized.codes(name)
        back = layout("compressed-tensors").read(out, name)
        assert back.scheme == codes.scheme
        assert all(torch.equal(_bytes(back.tensors()[part]), _bytes(each)) for part, each in codes.tensors().items())

        mine = {key.removeprefix(f"{name}."): value for key, value in ours.items() if key.startswith(f"{name}.")}
        plain = compressor.decompress(mine, group)
        assert torch.equal(plain["weight"].to(dtype), codes.dequantize(dtype)), name
        exact = {part: value.float() for part, value in plain.items() if part.startswith("weight")}
        again = compressor.compress(exact | {"weight": codes.dequantize(torch.float32)}, group)
        parts = {"weight", "weight_packed"} & mine.keys()
        assert all(torch.equal(_bytes(again[part]), _bytes(mine[part])) for part in parts), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [MXFP4(method="mxfp4"), NVFP4(method="nvfp4"), FP8(method="fp8", activations="none")])
def test_transformers_computes_the_logits_of_the_dequantized_weights(
    models: dict[torch.dtype, Path], tmp_path: Path, step: Quantize, dtype: torch.dtype
) -> None:
    out, quantized = written(models[dtype], tmp_path, step)

    loaded = AutoModelForCausalLM.from_pretrained(out)

    assert torch.equal(logits(loaded), logits(dequantized(models[dtype], quantized, dtype)))


def test_gpt2_keeps_eight_bit_floats_transposed_and_transformers_loads_them(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "model", n_layer=1)
    out, quantized = written(model, tmp_path, FP8(method="fp8", activations="none"))

    loaded = AutoModelForCausalLM.from_pretrained(out)

    assert torch.equal(logits(loaded), logits(dequantized(model, quantized, torch.float32)))
    for name in quantized.sites:
        back, codes = layout("compressed-tensors").read(out, name).tensors(), quantized.codes(name).tensors()
        assert all(torch.equal(_bytes(back[part]), _bytes(one)) for part, one in codes.items())


@pytest.mark.parametrize("step", [FP8(method="fp8"), SmoothQuant(method="smoothquant"), MXFP4(method="mxfp4")], ids=str)
def test_transposed_layers_refuse_what_nobody_would_compute_and_name_what_can(step: Quantize) -> None:
    site = Site("transformer.h.0.attn.c_attn", rows=384, columns=128, transposed=True)

    with pytest.raises(FormatUnfit, match=r"c_attn keeps its weight transposed.*rtn or gptq at . bits"):
        layout("compressed-tensors").refuse([site], {site.name: step.scheme()})


@pytest.mark.parametrize("step", [NVFP4(method="nvfp4"), SmoothQuant(method="smoothquant")], ids=str)
def test_experts_refuse_what_transformers_reads_wrong_and_name_what_it_reads_right(step: Quantize) -> None:
    names = ("model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.experts.1.w1")
    sites = [Site(name, rows=64, columns=64, transposed=False) for name in names]

    with pytest.raises(FormatUnfit, match=r"experts\.0\.w1 is an expert of a mixture.*mxfp4"):
        layout("compressed-tensors").refuse(sites, dict.fromkeys(names, step.scheme()))
    with pytest.raises(FormatUnfit, match="store them alike"):
        ways = (RTN(method="rtn", bits=4, group_size=32), RTN(method="rtn", bits=8, group_size=32))
        layout("compressed-tensors").refuse(sites, {name: way.scheme() for name, way in zip(names, ways, strict=True)})
    layout("compressed-tensors").refuse(sites, dict.fromkeys(names, MXFP4(method="mxfp4").scheme()))


def test_every_layer_may_be_stored_in_its_own_way_and_transformers_loads_each(
    models: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    ways: dict[str, Quantize] = {
        "q_proj": RTN(method="rtn", bits=8, group_size=32),
        "k_proj": RTN(method="rtn", bits=3, group_size="channel"),
        "v_proj": RTN(method="rtn", bits=2, group_size=32),
        "o_proj": FP8(method="fp8", activations="none"),
        "gate_proj": MXFP4(method="mxfp4"),
        "up_proj": NVFP4(method="nvfp4"),
    }
    out, quantized = written(models[torch.bfloat16], tmp_path, RTN(method="rtn", group_size=64), **ways)

    loaded = AutoModelForCausalLM.from_pretrained(out)

    assert torch.equal(logits(loaded), logits(dequantized(models[torch.bfloat16], quantized, torch.bfloat16)))
    config = read_config(out)["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 7
    for name in quantized.sites:
        assert layout("compressed-tensors").read(out, name).scheme == quantized.schemes[name]


def test_bits_that_differ_from_block_to_block_are_told_by_one_pattern_a_kind_of_layer() -> None:
    names = [f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 12)] + ["model.layers.1.mlp.down_proj", "head.proj"]

    assert targets(names) == [
        r"re:^head\.proj$",
        r"re:^model\.layers\.(0|1|12)\.mlp\.up_proj$",
        r"re:^model\.layers\.(1)\.mlp\.down_proj$",
    ]


def test_zero_points_beside_another_scheme_are_refused_since_transformers_would_read_them_wrong() -> None:
    one, two = (Site(f"model.layers.0.mlp.{name}", 64, 64, transposed=False) for name in ("up_proj", "down_proj"))
    schemes = {one.name: Scheme("int", 4, 32, symmetric=False), two.name: Scheme("int", 8, 32, symmetric=False)}

    with pytest.raises(FormatUnfit, match="zero points"):
        layout("compressed-tensors").refuse([one, two], schemes)
    layout("compressed-tensors").refuse([one, two], schemes | {two.name: schemes[one.name]})


def test_blocks_of_four_bit_floats_that_do_not_divide_a_layer_are_refused_by_name() -> None:
    site = Site("model.layers.0.mlp.down_proj", rows=64, columns=80, transposed=False)

    with pytest.raises(GroupSizeIndivisible, match=r"blocks of 32 don't divide the 80 inputs of .*down_proj.*`ignore`"):
        layout("compressed-tensors").refuse([site], {site.name: MXFP4(method="mxfp4").scheme()})
    layout("compressed-tensors").refuse([site], {site.name: NVFP4(method="nvfp4").scheme()})


def test_what_vllm_computes_as_one_is_to_be_stored_alike() -> None:
    attention = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    experts = [f"model.layers.0.mlp.experts.{n}.{name}" for n in range(2) for name in ("gate_proj", "down_proj")]

    groups = stored_alike([*attention, *experts])

    assert groups == [tuple(attention[:3]), (attention[3],), tuple(experts)]
    four, eight = RTN(method="rtn").scheme(), RTN(method="rtn", bits=8).scheme()
    schemes = dict.fromkeys([*attention, *experts], four)
    assert torn_fusions(schemes, (), schemes) == []
    assert torn_fusions(schemes, (), schemes | {attention[0]: eight, experts[1]: eight}) == [
        "model.layers.0.mlp.experts",
        "model.layers.0.self_attn.{q_proj, k_proj, v_proj}",
    ]
    assert torn_fusions(attention[1:], attention[:1]) == ["model.layers.0.self_attn.{q_proj, k_proj, v_proj}"]


def test_the_written_config_names_the_scheme_that_it_stands_for(
    models: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    for number, step in enumerate(STEPS):
        (tmp_path / str(number)).mkdir()
        out, _ = written(models[torch.bfloat16], tmp_path / str(number), step)
        entry = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        columns = step.scheme().columns(128)
        assert scheme_of(entry, 128, 128 // columns) == step.scheme()

    values = torch.cat([torch.linspace(-7, 7, 5601), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5])])

    assert torch.equal(e2m1(to_e2m1(values)), FP4_E2M1_DATA.cast_to_fp4(values.clone().clamp(-6, 6)) + 0.0)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().contiguous().view(torch.uint8)
