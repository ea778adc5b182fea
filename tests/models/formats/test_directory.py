"""The directory around the weights: what is copied, what stays behind, what a failure leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.files.checkpoint import open_model
from models.formats import layout
from models.formats.compressed_tensors import write
from models.progress import Silent
from squeeze.errors import DiskFull
from tests.models.rounding import dequantized, rounded
from tests.models.tiny import gpt2, gpt_neox, llama


class Events(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.warnings.append(message)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(64)[None] * 7 % 512
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def test_everything_but_the_quantized_weights_is_copied_as_it_is(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", dtype=torch.bfloat16)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "LICENSE").write_text("free")
    (model / "evil.py").write_text("print('never')")
    source, quantized = rounded(model, tmp_path / "work")

    layout("gptq").write(source, quantized, tmp_path / "out", Silent())

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name
    assert not (tmp_path / "out" / "evil.py").exists()
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if name.removesuffix(".weight") not in quantized.sites]
    assert len(kept) == 7  # embeddings, head, last norm, two norms in each of two blocks
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)
    config, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", model))
    assert config.pop("quantization_config")["bits"] == 4
    assert config == original
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("import os")["input_ids"] == AutoTokenizer.from_pretrained(model)("import os")["input_ids"]


def test_references_to_code_and_paths_of_the_authors_machine_stay_behind(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    for name, secret in (("config.json", "_name_or_path"), ("tokenizer_config.json", "tokenizer_file")):
        settings = json.loads((model / name).read_text())
        settings |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, secret: "/home/author/checkpoint-7"}
        (model / name).write_text(json.dumps(settings))
    source, quantized = rounded(model, tmp_path / "work")

    layout("compressed-tensors").write(source, quantized, tmp_path / "out", Silent())

    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert "auto_map" not in written
    assert "/home/author" not in written
    assert str(tmp_path) not in written


def test_tied_embeddings_are_written_once_and_load_tied(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", tie_word_embeddings=True)
    source, quantized = rounded(model, tmp_path / "work")

    layout("compressed-tensors").write(source, quantized, tmp_path / "out", Silent())

    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(dequantized(model, quantized, torch.float32)))


def test_a_checkpoint_of_the_bare_base_model_with_old_buffers_gets_todays_names(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    legacy = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    legacy["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(legacy, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    source, quantized = rounded(model, tmp_path / "work")

    layout("compressed-tensors").write(source, quantized, tmp_path / "out", Silent())

    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert all(name.startswith("transformer.") for name in names)
    assert "transformer.h.0.attn.bias" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(dequantized(model, quantized, torch.float32)))


def test_a_head_that_the_files_call_otherwise_keeps_that_name(tmp_path: Path) -> None:
    model = gpt_neox(tmp_path / "model")
    source, quantized = rounded(model, tmp_path / "work")

    layout("compressed-tensors").write(source, quantized, tmp_path / "out", Silent())

    assert "embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "embed_out"} <= set(ignored)


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    source, quantized = rounded(model, tmp_path / "work")

    write(source, quantized, tmp_path / "out", Silent(), shard_bytes=200_000)

    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert open_model(model).names()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(dequantized(model, quantized, torch.float32)))


def test_what_an_earlier_attempt_left_is_replaced_whole(tmp_path: Path) -> None:
    source, quantized = rounded(llama(tmp_path / "model"), tmp_path / "work")
    for leaving in (tmp_path / "out", tmp_path / ".out.partial"):
        leaving.mkdir()
        (leaving / "stale.safetensors").write_bytes(b"stale")

    layout("compressed-tensors").write(source, quantized, tmp_path / "out", Silent())

    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "work"]


def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path: Path) -> None:
    source, quantized = rounded(llama(tmp_path / "model"), tmp_path / "work")
    (tmp_path / "full").mkdir()

    class DiskFills(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            with Path("/dev/full").open("wb", buffering=0) as full:  # what the kernel says when a disk is full
                full.write(b"x")

    with pytest.raises(DiskFull, match="free space"):
        layout("gptq").write(source, quantized, tmp_path / "full" / "out", DiskFills())

    assert list((tmp_path / "full").iterdir()) == []


def test_a_fusion_torn_by_ignoring_is_a_warning_that_names_it(tmp_path: Path) -> None:
    events = Events()
    ignored = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    source, quantized = rounded(llama(tmp_path / "model"), tmp_path / "work", ignored=ignored)

    layout("gptq").write(source, quantized, tmp_path / "out", events)

    assert len(events.warnings) == 1
    assert "model.layers.0.self_attn.{q_proj, k_proj, v_proj}" in events.warnings[0]
