"""GGUF files: codes stand in them as they were made, and llama.cpp computes and tokenizes what transformers does.

llama.cpp runs in an environment of its own, which SQUEEZE_LLAMACPP_PYTHON names; tests that need it are skipped where
there is none.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models.files.checkpoint import SourceModel, open_model
from models.formats import gguf as layout
from models.formats.gguf_families import FAMILIES as HELD
from models.formats.gguf_families import config_of, family_of
from models.formats.gguf_vocabulary import NAMES, refuse_vocabulary
from models.progress import Silent
from models.texts.generic import standard_library
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import FormatUnfit
from squeeze.steps.quantization import RTN, GroupSize
from squeeze.steps.schemes import Scheme
from tests.models.rounding import dequantized, rounded
from tests.models.tiny import FAMILIES

PYTHON = os.environ.get("SQUEEZE_LLAMACPP_PYTHON")
PROGRAM = Path(__file__).resolve().parents[3] / "models" / "certifying" / "in_llamacpp.py"
needs_llamacpp = pytest.mark.skipif(PYTHON is None, reason="SQUEEZE_LLAMACPP_PYTHON names no llama.cpp environment")

# What a family's tiny model has to be like for llama.cpp, which supposes the pattern of the published models.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    },
    "olmo3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "starcoder2": {"sliding_window": None},
}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def plain(model: Path, work: Path) -> tuple[SourceModel, QuantizedModel]:
    """A model of which nothing is quantized."""
    source = open_model(model)
    step = RTN.model_validate({"method": "rtn"})
    return source, QuantizedModel(work, step, {}, {}, (), source.dtype)


def written(source: SourceModel, quantized: QuantizedModel, out: Path) -> Path:
    layout.write(source, quantized, out, Silent())
    return out


def asked(out: Path, windows: list[list[int]], texts: list[tuple[str, list[int]]], scratch: Path) -> dict[str, Any]:
    """What llama.cpp says of a file."""
    request = {
        "parent": os.getpid(),
        "ids": windows,
        "first_scored": [1] * len(windows),
        "prompt_tokens": 8,
        "new_tokens": 4,
        "directory": str(out),
        "texts": texts,
    }
    (scratch / "request.json").write_text(json.dumps(request))
    command = [str(PYTHON), str(PROGRAM), str(scratch / "request.json"), str(scratch / "answer.json")]
    subprocess.run(command, check=True, capture_output=True)
    answer: dict[str, Any] = json.loads((scratch / "answer.json").read_text())
    return answer


def scores(model: Any, windows: list[list[int]]) -> list[float]:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(windows)).logits.float()
    targets = torch.tensor(windows)[:, 1:]
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    found: list[float] = each.mean(dim=1).tolist()
    return found


def random_windows(vocabulary: int = 512) -> list[list[int]]:
    windows: list[list[int]] = torch.randint(
        1, vocabulary, (2, 96), generator=torch.Generator().manual_seed(1)
    ).tolist()
    return windows


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, "channel"), (8, 64)])
def test_symmetric_codes_stand_in_the_file_as_they_are(
    family: str, bits: int, group_size: GroupSize, tmp_path: Path
) -> None:
    source, quantized = rounded(FAMILIES[family](tmp_path / "m"), tmp_path / "w", bits=bits, group_size=group_size)

    out = written(source, quantized, tmp_path / "out")

    for name in quantized.sites:
        expected = quantized.codes(name).dequantize(torch.float32)
        assert torch.equal(layout.read(out, name).dequantize(torch.float32), expected), name


def test_zero_points_are_off_by_what_float16_takes_from_an_offset(tmp_path: Path) -> None:
    source, quantized = rounded(FAMILIES["llama"](tmp_path / "m"), tmp_path / "w", group_size=32, symmetric=False)

    out = written(source, quantized, tmp_path / "out")

    for name in quantized.sites:
        codes = quantized.codes(name)
        offset = float((codes.tensors()["scale"] * codes.tensors()["zero"].float()).max())
        apart = layout.read(out, name).dequantize(torch.float32) - codes.dequantize(torch.float32)
        assert float(apart.abs().max()) <= offset * 2**-11, name


def test_the_rows_of_rotated_queries_are_paired_and_nothing_else_moves(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "m")
    out = written(*plain(model, tmp_path / "w"), tmp_path / "out")

    tensors = {one.name: one for one in gguf.GGUFReader(out / "model.gguf").tensors}
    stored = AutoModelForCausalLM.from_pretrained(model).state_dict()

    q = torch.from_numpy(tensors["blk.0.attn_q.weight"].data.copy())
    halves = stored["model.layers.0.self_attn.q_proj.weight"].view(4, 2, 16, 128)
    assert torch.equal(q.view(4, 16, 2, 128), halves.transpose(1, 2))
    v = torch.from_numpy(tensors["blk.0.attn_v.weight"].data.copy())
    assert torch.equal(v, stored["model.layers.0.self_attn.v_proj.weight"])


@pytest.mark.parametrize(
    ("scheme", "columns"),
    [(Scheme("int", 3, 32), 128), (Scheme("int", 8, 32, symmetric=False), 128), (Scheme("float8", 8, "channel"), 128)],
)
def test_what_no_block_type_holds_is_refused(scheme: Scheme, columns: int) -> None:
    site = Site("model.layers.0.mlp.up_proj", 64, columns, transposed=False)

    with pytest.raises(FormatUnfit, match="kquant"):
        layout.refuse([site], {site.name: scheme})


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    site = Site("model.layers.0.mlp.up_proj", 64, 40, transposed=False)

    with pytest.raises(FormatUnfit, match="40 inputs of model"):
        layout.refuse([site], {site.name: Scheme("int", 4, "channel")})


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("opt", {}, "gguf is written for"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "scaled by 99"),
        ("gemma3_text", {}, "alternate"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("stablelm", {"qk_layernorm": True}, "normalizes"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = open_model(FAMILIES[family](tmp_path / "m", **changes))

    with pytest.raises(FormatUnfit, match=reason):
        family_of(config_of(source))


def byte_level(steps: tuple[str, ...], ignore_merges: bool) -> Tokenizer:
    """A tokenizer that splits text as llama.cpp's name for `steps` says."""
    parts: list[Any] = []
    for step in steps:
        if step == "bytes":
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        elif step in ("digit", "digits"):
            parts.append(pre_tokenizers.Digits(individual_digits=step == "digit"))
        elif step == "marks":
            parts.append(pre_tokenizers.Punctuation("contiguous"))
        else:
            parts.append(pre_tokenizers.Split(Regex(step), "isolated"))
    if "bytes" not in steps:
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    bare = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bare.pre_tokenizer = pre_tokenizers.Sequence(parts)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [source for _, (_, source) in zip(range(6), standard_library("train"), strict=False)]
    bare.train_from_iterator([*text, "In 1999 we'll see 123456 CamelCase naïve wörds, won't WE'RE"] * 2, trainer)
    return bare


TEXTS = (
    "Hello world, it's 12345 o'clock!",
    "  def f(x):\n\treturn x**2\n\n\n# end  ",
    "Ünïcødé — naïve café 你好世界 😀\r\n tab\t\tx",
    "I'LL we've DON'T 3.14159 1,000,000 HTTPServer",
    "<|endoftext|>a b",
    "",
)


def test_a_split_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    bare = byte_level((r"\p{L}+|\s+|[^\p{L}\s]+",), ignore_merges=False)
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path)

    with pytest.raises(FormatUnfit, match="no name"):
        refuse_vocabulary(tmp_path)


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        tmp_path
    )

    with pytest.raises(FormatUnfit, match="WordLevel"):
        refuse_vocabulary(tmp_path)


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "ignore_merges"), list(NAMES), ids=list(NAMES.values()))
def test_llama_cpp_tokenizes_as_the_tokenizer_does(steps: tuple[str, ...], ignore_merges: bool, tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "m", vocab_size=720)
    bare = byte_level(steps, ignore_merges)
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|endoftext|>").save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    out = written(*plain(model, tmp_path / "w"), tmp_path / "out")

    answer = asked(out, random_windows(700), [(text, tokenizer(text)["input_ids"]) for text in TEXTS], tmp_path)

    assert answer.get("error") is None
    assert answer["texts"] == len(TEXTS)


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(HELD))
def test_llama_cpp_computes_every_family_in_float32_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family](tmp_path / "m", **CHANGES.get(family, {}))
    out = written(*plain(model, tmp_path / "w"), tmp_path / "out")
    windows = random_windows()

    answer = asked(out, windows, [], tmp_path)

    expected = scores(AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"), windows)
    assert answer.get("error") is None
    assert answer["nll"] == pytest.approx(expected, rel=1e-4)


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("scaling", sorted(SCALED))
def test_llama_cpp_scales_rotary_positions_as_transformers_does(scaling: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "m", rope_parameters=SCALED[scaling])
    out = written(*plain(model, tmp_path / "w"), tmp_path / "out")
    windows = random_windows()

    answer = asked(out, windows, [], tmp_path)

    assert answer["nll"] == pytest.approx(scores(AutoModelForCausalLM.from_pretrained(model), windows), rel=1e-4)


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_llama_cpp_measures_the_perplexity_of_the_codes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    bundled = Path(__file__).resolve().parents[3] / "models" / "bundled"
    source, quantized = rounded(bundled, tmp_path / "w", bits=bits, group_size=32, symmetric=symmetric)
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    text = "".join(source for _, (_, source) in zip(range(6), standard_library("held_out"), strict=False))
    ids = tokenizer(text, verbose=False)["input_ids"]
    windows = [ids[n : n + 256] for n in range(0, 1024, 256)]
    out = written(source, quantized, tmp_path / "out")

    answer = asked(out, windows, [(each, tokenizer(each)["input_ids"]) for each in TEXTS], tmp_path)

    expected = scores(dequantized(bundled, quantized, torch.float32), windows)
    assert answer.get("error") is None
    assert answer["sample"]
    assert math.exp(sum(answer["nll"]) / 4) == pytest.approx(math.exp(sum(expected) / 4), rel=0.02)
