"""Every file that numbers tokens follows; models with more rows than tokens, and every family, are trimmed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.files.checkpoint import open_model
from models.prune.slimming.smaller import sides_of
from models.prune.vocabularies.trimming import weights
from tests.models import tiny
from tests.models.prune.tokenizers_of import byte_level, model_with
from tests.models.prune.trim_parts import LINES, largest_difference, trim


def test_settings_and_lists_beside_the_tokenizer_get_the_new_numbers(tmp_path: Path) -> None:
    made = byte_level()
    model, rules = model_with(made, tmp_path / "model"), json.loads(made.to_str())
    words, end = rules["model"]["vocab"], made.token_to_id("</s>")
    (model / "vocab.json").write_text(json.dumps(words))
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, rules["model"]["merges"])]) + "\n")
    (model / "added_tokens.json").write_text(json.dumps({"<|user|>": made.token_to_id("<|user|>")}))
    (model / "tokenizer.model").write_text("IQ== 0\n")
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [end, words["Ġka"]], "suppress_tokens": [*range(300, 700)]})
    )
    done = trim({}, model, tmp_path / "room")
    after = AutoTokenizer.from_pretrained(done.whole)
    left = after.get_vocab()
    kept = json.loads((done.whole / "tokenizer.json").read_text())["model"]
    assert json.loads((done.whole / "vocab.json").read_text()) == kept["vocab"]
    merges = (done.whole / "merges.txt").read_text().splitlines()
    assert merges == ["#version: 0.2", *map(" ".join, kept["merges"])]
    assert json.loads((done.whole / "added_tokens.json").read_text()) == {"<|user|>": left["<|user|>"]}
    generation = json.loads((done.whole / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [left["</s>"], left["Ġka"]]
    texts = {number: token for token, number in words.items()}
    assert generation["suppress_tokens"] == [left[texts[n]] for n in range(300, 700) if texts[n] in left]
    assert not (done.whole / "tokenizer.model").exists()
    told = done.slimming.trimming
    assert told is not None and told.left_out_files == ["tokenizer.model"]
    assert any("tokenizer.model can't be written anew" in warning for warning in done.warnings)


def test_rows_that_no_token_has_go_first_and_tokens_without_a_row_stay(tmp_path: Path) -> None:
    made = byte_level()
    model = model_with(made, tmp_path / "model", "qwen2", vocab_size=1024, tie_word_embeddings=True)
    done = trim({}, model, tmp_path / "room")
    told = done.slimming.trimming
    assert told is not None and (told.rows_before, told.rows_after) == (1024, 384)
    result, tokens = AutoModelForCausalLM.from_pretrained(done.whole), AutoTokenizer.from_pretrained(done.whole)
    assert len(result.get_input_embeddings().weight) == 384 == told.tokens_after
    assert {"<s>", "</s>", "<|user|>"} <= tokens.get_vocab().keys() and max(tokens.get_vocab().values()) == 383


def test_rows_are_the_original_s_whatever_lies_between_them(tmp_path: Path) -> None:
    source = open_model(model_with(byte_level(), tmp_path / "model", "gptj"))
    kept = torch.tensor([0, 1, 2, 9, 10, 11, 12, 13, 14, 15, 16, 300, 703])
    for rows in (1, 7, 1000):
        pieces = weights(source, sides_of(source), kept, band_bytes=rows * 4 * tiny.HIDDEN)
        made = {name: tensor for piece in pieces for name, tensor in piece.make().items()}
        assert all(dict(piece.shapes)[name][1] == made[name].shape for piece in pieces for name in piece.shapes)
        changed = [name for name, tensor in made.items() if not torch.equal(tensor, source.tensor(name))]
        assert sorted(changed) == ["lm_head.bias", "lm_head.weight", "transformer.wte.weight"]
        assert all(torch.equal(made[name], source.tensor(name)[kept]) for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_says_the_same_of_the_tokens_that_stay(tmp_path: Path, family: str) -> None:
    model = model_with(byte_level(), tmp_path / "model", family, pad_token_id=0)
    done = trim({}, model, tmp_path / "room")
    before, after = (AutoTokenizer.from_pretrained(one) for one in (model, done.whole))
    left, told = after.get_vocab(), done.slimming.trimming
    assert told is not None and told.largest_difference <= 1e-5
    numbers = {number: left[token] for token, number in before.get_vocab().items() if left.get(token, 999) < 384}
    ids = [number for line in LINES[:6] for number in before(line)["input_ids"]][:100]
    assert largest_difference(model, done.whole, ids, numbers) <= 1e-5
