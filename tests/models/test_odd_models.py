"""Odd but real: model directories as strangers publish them. Each works as in transformers, or is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.files.checkpoint import convert_legacy, has_legacy_weights_only, open_model
from models.files.safetensors_file import read_header
from models.formats import layout
from models.progress import Silent
from squeeze.errors import ModelAlreadyCompressed, ModelMalformed, ModelUnsafe, NotFinite
from squeeze.names import Format
from squeeze.steps.quantization import GPTQ
from tests.models.engine_parts import compressed, perplexity_in_transformers, thrown
from tests.models.tiny import FAMILIES, VOCABULARY

WEIGHTS = "model.safetensors"
State = dict[str, Tensor]


def state_of(model: Path) -> State:
    return load_file(model / WEIGHTS)


def put(model: Path, state: State) -> Path:
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    return model


def configured(model: Path, **changes: Any) -> Path:
    """Fields of `config.json` changed; `...` takes one away."""
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return model


def rope(**scaling: Any) -> Callable[[Path], Path]:
    """A Llama as written before transformers 5, which had other names for the same."""
    return lambda path: configured(
        FAMILIES["llama"](path), rope_scaling=scaling, rope_theta=10000.0, rope_parameters=...
    )


def family(name: str, **changes: Any) -> Callable[[Path], Path]:
    return lambda path: FAMILIES[name](path, **changes)


def gpt2_as_on_the_hub(path: Path) -> Path:
    """Without the base model's prefix, with causal masks larger than the model's positions."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state_of(FAMILIES["gpt2"](path)).items()}
    for n in range(2):
        state[f"h.{n}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    return put(path, state)


def pythia_as_on_the_hub(path: Path) -> Path:
    state = state_of(FAMILIES["gpt_neox"](path, dtype=torch.float16))
    state["embed_out.weight"] = state.pop("lm_head.weight", state.get("embed_out.weight"))
    for n in range(2):
        attention = f"gpt_neox.layers.{n}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9).half()  # minus infinity there
        state[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
    return put(path, state)


def llama_with_frequencies(path: Path) -> Path:
    """Old checkpoints carry buffers that today's classes compute; these here are wrong."""
    return put(path, state_of(FAMILIES["llama"](path)) | {"model.rotary_emb.inv_freq": torch.ones(16)})


def tied(change: Callable[[State], None]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        state = state_of(FAMILIES["llama"](path, tie_word_embeddings=True))
        change(state)
        return put(path, state)

    return make


def head_of_its_own(state: State) -> None:
    state["lm_head.weight"] = torch.randn(VOCABULARY, 128, generator=torch.Generator().manual_seed(1)) / 10


def head_alone(state: State) -> None:
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")


def two_shards(path: Path) -> Path:
    state = state_of(FAMILIES["llama"](path))
    names = sorted(state)
    (path / WEIGHTS).unlink()
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def hub_cache(path: Path) -> Path:
    """A snapshot of links to blobs."""
    model = FAMILIES["llama"](path / "plain")
    (path / "blobs").mkdir()
    (path / "snapshots" / "main").mkdir(parents=True)
    for n, file in enumerate(sorted(model.iterdir())):
        file.rename(path / "blobs" / str(n))
        (path / "snapshots" / "main" / file.name).symlink_to(f"../../blobs/{n}")
    return path / "snapshots" / "main"


ODD: dict[str, Callable[[Path], Path]] = {
    "OPT in float16": family("opt", dtype=torch.float16),
    "OPT-350m's shape": family("opt", dtype=torch.float16, do_layer_norm_before=False, word_embed_proj_dim=64),
    "GPT-2 as on the Hub": gpt2_as_on_the_hub,
    "Pythia as on the Hub": pythia_as_on_the_hub,
    "NeoX without parallel residuals": family("gpt_neox", use_parallel_residual=False, rotary_pct=1.0),
    "Llama with frequencies in the file": llama_with_frequencies,
    "Llama with all biases": family("llama", attention_bias=True, mlp_bias=True),
    "one block": family("llama", num_hidden_layers=1),
    "float64": lambda path: put(path, {name: t.double() for name, t in state_of(FAMILIES["llama"](path)).items()}),
    "Qwen3 with wide heads": family("qwen3", head_dim=64),
    "Mistral with a window shorter than the text": family("mistral", head_dim=64, sliding_window=16),
    "Qwen2 with a window in its second block": family(
        "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "rope llama3": rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "rope linear, old spelling": rope(type="linear", factor=4.0),
    "rope dynamic": rope(rope_type="dynamic", factor=2.0),
    "rope yarn": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "tied": family("llama", tie_word_embeddings=True),
    "tied in words, but the file's head differs": tied(head_of_its_own),
    "tied, and the file has the head alone": tied(head_alone),
    "a vocabulary padded beyond the tokenizer's": family("llama", vocab_size=640),
    "no dtype in the config": lambda path: configured(FAMILIES["llama"](path, dtype=torch.bfloat16), dtype=...),
    "the old spelling of the dtype": lambda path: configured(FAMILIES["llama"](path), dtype=..., torch_dtype="float32"),
    "no positions in the config": lambda path: configured(FAMILIES["llama"](path), max_position_embeddings=...),
    "two shards": two_shards,
    "a snapshot of the Hub's cache": hub_cache,
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_model_has_the_perplexity_that_transformers_sees_and_is_written_as_it_was_rounded(
    tmp_path: Path, name: str
) -> None:
    model, windows = ODD[name](tmp_path / "model"), thrown()
    done, quality = compressed(model, tmp_path / "work", windows=windows)
    assert quality.perplexity_before == pytest.approx(perplexity_in_transformers(model, windows), rel=1e-3)
    assert quality.perplexity_after is not None and quality.perplexity_after != quality.perplexity_before

    source = open_model(model)
    layout("compressed-tensors").write(source, done.model, tmp_path / "out", Silent())
    for site in done.model.sites:
        ours, read = done.model.codes(site), layout("compressed-tensors").read(tmp_path / "out", site)
        assert torch.equal(read.codes, ours.codes) and torch.equal(read.scale, ours.scale)
    written = read_header(tmp_path / "out" / WEIGHTS)
    assert not any(key.endswith((".attn.bias", "attention.bias", ".masked_bias", ".inv_freq")) for key in written)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


FORMATS: tuple[Format, ...] = ("compressed-tensors", "gptq")


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("group_size", ["channel", 32])
def test_rare_widths_asymmetric_and_with_a_part_of_q_k_v_left_alone_stand_in_both_formats(
    tmp_path: Path, bits: Any, group_size: Any
) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=1)
    step = GPTQ(method="gptq", bits=bits, group_size=group_size, symmetric=False, ignore=("*.k_proj",))
    done, _ = compressed(model, tmp_path / "work", step)
    assert done.model.ignored == ("model.layers.0.self_attn.k_proj",)
    for name in FORMATS:
        layout(name).write(open_model(model), done.model, tmp_path / name, Silent())
        for site in done.model.sites:
            ours, read = done.model.codes(site), layout(name).read(tmp_path / name, site)
            assert torch.equal(read.dequantize(torch.float32), ours.dequantize(torch.float32))
        assert read_header(tmp_path / name / WEIGHTS)["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float32


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def cast(part: str, dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {key: tensor.to(dtype) if part in key else tensor for key, tensor in state.items()}


def filled(name: str, value: float) -> Callable[[State], State]:
    return lambda state: state | {name: torch.full_like(state[name], value)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (without("lm_head.weight"), ModelMalformed, "no tensor lm_head.weight"),
        (without("model.norm.weight"), ModelMalformed, "no tensor model.norm.weight"),
        (without("model.layers.1.mlp.up_proj.weight"), ModelMalformed, "no tensor model.layers.1.mlp.up_proj"),
        (cast("q_proj", torch.int8), ModelAlreadyCompressed, "int8.*16-bit model"),
        (cast("q_proj", torch.uint32), ModelAlreadyCompressed, "uint32"),
        (cast("_proj", torch.float8_e4m3fn), ModelAlreadyCompressed, "float8_e4m3fn"),
        (filled("model.norm.weight", torch.nan), NotFinite, "model.norm.weight"),
        (filled("model.norm.weight", 3e38), NotFinite, "logits"),
        (filled("lm_head.weight", 1e38), NotFinite, "logits"),
    ],
)
def test_weights_that_can_t_be_compressed_are_named(
    tmp_path: Path, change: Callable[[State], State], error: type[Exception], words: str
) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    put(model, change(state_of(model)))
    with pytest.raises(error, match=words):
        compressed(model, tmp_path / "work")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_is_missing_shows_before_any_block_is_worked_on(tmp_path: Path, name: str) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    put(model, without(name)(state_of(model)))
    with pytest.raises(ModelMalformed, match=name):
        compressed(model, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "128"},
        {"num_attention_heads": 3},
        {"hidden_act": "no such"},
        {"dtype": "float7"},
        {"rope_parameters": {"rope_type": "no such", "rope_theta": 1e4}},
        {"vocab_size": None},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 0},
    ],
    ids=str,
)
def test_a_config_that_transformers_can_t_build_is_refused_in_its_words(tmp_path: Path, change: dict[str, Any]) -> None:
    model = configured(FAMILIES["llama"](tmp_path / "model"), **change)
    with pytest.raises(ModelMalformed, match=r"config\.json") as refused:
        compressed(model, tmp_path / "work")
    assert str(tmp_path) not in refused.value.message


def test_a_kernel_that_the_author_asked_for_is_not_asked_of_others(tmp_path: Path) -> None:
    model = configured(
        FAMILIES["llama"](tmp_path / "model"), attn_implementation="flash_attention_2", _attn_implementation="x"
    )
    done, _ = compressed(model, tmp_path / "work")
    layout("gptq").write(open_model(model), done.model, tmp_path / "out", Silent())
    assert "attn_implementation" not in (tmp_path / "out" / "config.json").read_text()


def test_other_weights_in_the_directory_are_left_where_they_are(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    (model / WEIGHTS).rename(model / "weights.safetensors")
    whole = open_model(model).weight_bytes
    for name in ("consolidated", "adapter_model", "optimizer"):
        save_file({f"{name}.weight": torch.zeros(4)}, model / f"{name}.safetensors")
    assert open_model(model).weight_bytes == whole


def pickled(path: Path, shards: int = 1, **how: Any) -> Path:
    state = state_of(FAMILIES["opt"](path, dtype=torch.float16))
    (path / WEIGHTS).unlink()
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin", **how)
        return path
    names = sorted(state)
    places = {name: f"pytorch_model-0000{1 + n % shards}-of-0000{shards}.bin" for n, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: state[name] for name in names if places[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return path


@pytest.mark.parametrize(
    "how",
    [{}, {"_use_new_zipfile_serialization": False}, {"shards": 2}],
    ids=["zip", "before torch 1.6", "two shards"],
)
def test_pickled_weights_of_every_age_give_what_safetensors_give(tmp_path: Path, how: dict[str, Any]) -> None:
    model = pickled(tmp_path / "pickled", **how)
    (model / "training_args.bin").write_bytes(b"no weights")
    assert has_legacy_weights_only(model)
    convert_legacy(model, tmp_path / "converted")
    plain = state_of(FAMILIES["opt"](tmp_path / "plain", dtype=torch.float16))
    source = open_model(tmp_path / "converted")
    assert {name: source.tensor(name).double().sum() for name in source.names()} == {
        name: tensor.double().sum() for name, tensor in plain.items()
    }


def test_where_both_kinds_of_weights_lie_safetensors_are_taken(tmp_path: Path) -> None:
    model = FAMILIES["opt"](tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"no pickle")
    assert not has_legacy_weights_only(model)
    assert open_model(model).names()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ModelMalformed),
        (b"PK cut short", ModelMalformed),
        (b"garbage" * 99, ModelUnsafe),
        ({"state_dict": {"a": torch.zeros(1)}}, ModelUnsafe),
        ({"a": torch.zeros(1), "epoch": 3}, ModelUnsafe),
    ],
)
def test_pickles_that_are_no_plain_weights_are_refused(tmp_path: Path, content: Any, error: type[Exception]) -> None:
    model = pickled(tmp_path / "model")
    if isinstance(content, bytes):
        (model / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, model / "pytorch_model.bin")
    with pytest.raises(error, match=r"pytorch_model\.bin .*safetensors"):
        convert_legacy(model, tmp_path / "converted")


@pytest.mark.parametrize(("make", "index"), [(two_shards, "model.safetensors"), (pickled, "pytorch_model.bin")])
def test_a_missing_shard_is_named(tmp_path: Path, make: Callable[..., Path], index: str) -> None:
    model = make(tmp_path / "model") if make is two_shards else make(tmp_path / "model", shards=2)
    lost = next(path for path in model.iterdir() if "00002-of" in path.name)
    lost.unlink()
    with pytest.raises(ModelMalformed, match=f"{index}.index.json names {lost.name}, which is missing"):
        convert_legacy(model, tmp_path / "converted") if make is pickled else open_model(model)


def test_a_directory_without_weights_or_with_dangling_links_says_so(tmp_path: Path) -> None:
    model = FAMILIES["opt"](tmp_path / "model")
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").symlink_to("../nowhere")
    assert not has_legacy_weights_only(model)
    with pytest.raises(ModelMalformed, match="no weights"):
        open_model(model)
