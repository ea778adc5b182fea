"""A vocabulary trimmed to texts: they keep their tokens, others can be told, and the model says the same of both."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeeze.errors import SpecInvalid
from tests.models.job_parts import Heard, digests
from tests.models.prune.tokenizers_of import BEGIN, KINDS, model_with
from tests.models.prune.trim_parts import LINES, UNSEEN, largest_difference, trim


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("models")
    return {
        name: model_with(make(), room / name, tie_word_embeddings=name == "unigram") for name, make in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_texts_keep_their_tokens_and_the_model_says_the_same_of_them(
    tmp_path: Path, models: dict[str, Path], kind: str
) -> None:
    model, done = models[kind], trim({}, models[kind], tmp_path)
    before, after = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(done.whole)
    words, left = before.get_vocab(), after.get_vocab()
    numbers = {number: left[token] for token, number in words.items() if token in left}
    assert left.keys() < words.keys() and sorted(numbers, key=numbers.__getitem__) == sorted(numbers)
    for line in LINES:
        for special in (True, False):
            old, new = (one(line, add_special_tokens=special)["input_ids"] for one in (before, after))
            assert [numbers[number] for number in old] == new
        assert after.decode(new) == before.decode(old)
    for line in UNSEEN:
        old, new = (one(line, add_special_tokens=False)["input_ids"] for one in (before, after))
        assert len(new) >= len(old) and after.decode(new) == before.decode(old)
    ids = [number for line in LINES[:6] for number in before(line)["input_ids"]][:100]
    assert largest_difference(model, done.whole, ids, numbers) <= 1e-5
    told = done.slimming.trimming
    assert told is not None and told.largest_difference <= 1e-5 and told.rows_after % 64 == 0
    assert told.found + told.parts + told.always + told.filled == told.tokens_after == len(left)
    whole = [line for line in LINES if kind != "unigram" or "  " not in line]  # which it makes one space of
    assert (told.corpus.texts, told.corpus.decoded_to_themselves) == (len(LINES), len(whole))
    result = AutoModelForCausalLM.from_pretrained(done.whole)
    assert result.config.vocab_size == len(result.get_input_embeddings().weight) == told.rows_after == len(left)
    assert result.config.bos_token_id == after.bos_token_id and after.convert_ids_to_tokens(0) is not None
    assert sum(one.numel() for one in result.parameters()) == done.slimming.parameters_after


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe"])
def test_merges_stay_in_their_order_and_what_tokens_are_merged_from_stays(
    tmp_path: Path, models: dict[str, Path], kind: str
) -> None:
    done = trim({}, models[kind], tmp_path)
    before, after = (json.loads((one / "tokenizer.json").read_text()) for one in (models[kind], done.whole))
    left, words = after["model"]["vocab"], [tuple(merge) for merge in after["model"]["merges"]]
    kept = [merge for merge in map(tuple, before["model"]["merges"]) if set(merge) | {"".join(merge)} <= left.keys()]
    assert words == kept and len(kept) < len(before["model"]["merges"])
    assert all("".join(merge) in left for merge in kept)
    assert {one["content"]: one["id"] for one in after["added_tokens"]} == {
        one["content"]: AutoTokenizer.from_pretrained(done.whole).get_vocab()[one["content"]]
        for one in before["added_tokens"]
    }
    special = after["post_processor"]["special_tokens"][BEGIN]["ids"]
    assert special == [Tokenizer.from_file(str(done.whole / "tokenizer.json")).token_to_id(BEGIN)]


def test_a_size_is_met_exactly_and_one_that_is_too_small_is_refused_with_the_least(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    done = trim({"size": 640}, models["byte_level"], tmp_path / "filled")
    told = done.slimming.trimming
    assert told is not None and told.rows_after == told.tokens_after == 640 and told.filled > 64
    least = trim({}, models["byte_level"], tmp_path / "least").slimming.trimming
    assert least is not None and least.filled < 64 and least.rows_after < 640
    with pytest.raises(SpecInvalid, match=f"the least size is {least.rows_after}, not 320") as refused:
        trim({"size": 320}, models["byte_level"], tmp_path / "small")
    assert refused.value.param == "steps.0.size"
    share = trim({"params_target": 0.9}, models["byte_level"], tmp_path / "share").slimming
    assert share.parameters_after <= 0.9 * share.parameters_before < share.parameters_after + 64 * 2 * 128


def test_texts_and_tokens_that_are_to_be_kept_are(tmp_path: Path, models: dict[str, Path]) -> None:
    model = models["byte_level"]
    words, plain = AutoTokenizer.from_pretrained(model), trim({}, model, tmp_path / "plain")
    left = AutoTokenizer.from_pretrained(plain.whole).get_vocab()
    gone = next(line for line in UNSEEN if any(token not in left for token in words.tokenize(line)))
    one = next(token for token in reversed(words.get_vocab()) if token not in left)
    kept = trim({"keep": [gone, one]}, model, tmp_path / "kept")
    assert {one, *words.tokenize(gone)} <= AutoTokenizer.from_pretrained(kept.whole).get_vocab().keys()


def test_a_text_that_needs_every_token_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    words = AutoTokenizer.from_pretrained(models["byte_level"])
    lines = [words.decode([number]) for number in range(len(words))]
    with pytest.raises(SpecInvalid, match="take another method"):
        trim({"keep": list(words.get_vocab())[:1024]}, models["byte_level"], tmp_path, [*lines, *LINES])


def test_a_job_that_is_tried_again_comes_to_the_same_bytes(tmp_path: Path, models: dict[str, Path]) -> None:
    first = trim({}, models["byte_level"], tmp_path)
    wrote, heard = digests(first.whole), Heard()
    again = trim({}, models["byte_level"], tmp_path, heard=heard)
    assert digests(again.whole) == wrote and again.measured == first.measured
    assert any("which an earlier attempt read" in message for message in heard.messages)
