"""A vocabulary trimmed to texts: they keep their tokens, others can be told, and the model says the same of both."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.prune.slimming.smaller import Done
from models.prune.vocabularies.keeping import keep
from models.prune.vocabularies.pieces import Pieces
from squeeze.errors import SpecInvalid
from tests.models.job_parts import Heard, digests
from tests.models.prune.tokenizers_of import BEGIN, KINDS, byte_level, model_with
from tests.models.prune.trim_parts import LINES, UNSEEN, largest_difference, trim


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("models")
    return {
        name: model_with(make(), room / name, tie_word_embeddings=name == "unigram") for name, make in KINDS.items()
    }


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Callable[[str], tuple[Path, Done]]:
    """(model, what was made of it), by the kind of its tokenizer."""

    @functools.cache
    def made(kind: str) -> tuple[Path, Done]:
        return models[kind], trim({}, models[kind], tmp_path_factory.mktemp(kind))

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_texts_keep_their_tokens_and_the_model_says_the_same_of_them(
    trimmed: Callable[[str], tuple[Path, Done]], kind: str
) -> None:
    model, done = trimmed(kind)
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
    trimmed: Callable[[str], tuple[Path, Done]], kind: str
) -> None:
    model, done = trimmed(kind)
    before, after = (json.loads((one / "tokenizer.json").read_text()) for one in (model, done.whole))
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


def test_chats_keep_what_their_template_writes_without_any_in_the_text(
    trimmed: Callable[[str], tuple[Path, Done]],
) -> None:
    before, after = (
        AutoTokenizer.from_pretrained(one) for one in (trimmed("byte_level")[0], trimmed("byte_level")[1].whole)
    )
    assert after.chat_template == before.chat_template
    chat = [{"role": "user", "content": "a"}]
    old, new = (one.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for one in (before, after))
    assert before.convert_ids_to_tokens(old) == after.convert_ids_to_tokens(new)
    assert {"<|user|>", "<|assistant|>", "</s>"} <= after.get_vocab().keys()


def test_a_size_is_filled_with_what_was_frequent_and_the_least_one_is_told() -> None:
    rules = json.loads(byte_level().to_str())
    pieces, words = Pieces(rules), rules["model"]["vocab"]
    long = max(words, key=len)
    kept = keep({words[long]}, pieces.basic(), pieces, 704, 320, 64)
    assert kept.rows == len(kept.numbers) == 320 and kept.found == 1 and kept.always >= 256 - len(long)
    first = ["".join(merge) for merge in rules["model"]["merges"][: kept.filled - 10]]
    assert {words[piece] for piece in first} <= set(kept.numbers)
    parts = pieces.parts(words[long])
    assert parts <= set(kept.numbers) and kept.parts == len(parts) - 1 > len(long) - 1
    assert keep({words[long]}, pieces.basic(), pieces, 704, None, 64).rows == 320
    assert keep({words[long]}, pieces.basic(), pieces, 704, None, 1).filled == 0
    with pytest.raises(SpecInvalid, match="the least size is 320, not 256") as refused:
        keep({words[long]}, pieces.basic(), pieces, 704, 256, 64)
    assert refused.value.param == "size"
    with pytest.raises(SpecInvalid, match="take another method"):
        keep(set(words.values()), set(), pieces, 704, None, 64)
    rows = keep({words[long]}, pieces.basic(), pieces, 1024, 960, 64)  # of which 324 are no token's
    assert set(range(700)) <= set(rows.numbers) and len(rows.numbers) == 960


def test_a_share_of_the_parameters_is_met_and_what_is_to_be_kept_is(
    tmp_path: Path, trimmed: Callable[[str], tuple[Path, Done]]
) -> None:
    model, plain = trimmed("byte_level")
    words, left = (AutoTokenizer.from_pretrained(one) for one in (model, plain.whole))
    gone = next(line for line in UNSEEN if any(token not in left.get_vocab() for token in words.tokenize(line)))
    one = next(token for token in reversed(words.get_vocab()) if token not in left.get_vocab())
    done = trim({"params_target": 0.9, "keep": [gone, one]}, model, tmp_path)
    told = done.slimming
    assert told.parameters_after <= 0.9 * told.parameters_before < told.parameters_after + 64 * 2 * 128
    assert {one, *words.tokenize(gone)} <= AutoTokenizer.from_pretrained(done.whole).get_vocab().keys()
    with pytest.raises(SpecInvalid, match="the least size is 384, not 320") as refused:
        trim({"size": 320}, model, tmp_path / "small")
    assert refused.value.param == "steps.0.size"


def test_a_job_that_is_tried_again_comes_to_the_same_bytes(
    tmp_path: Path, trimmed: Callable[[str], tuple[Path, Done]]
) -> None:
    model, first = trimmed("byte_level")
    wrote, heard = digests(first.whole), Heard()
    again = trim({}, model, first.whole.parents[1], heard=heard)
    assert digests(again.whole) == wrote and again.measured == first.measured
    assert any("which an earlier attempt read" in message for message in heard.messages)
