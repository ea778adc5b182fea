"""What of a user's file is read, and what ends a job whose text would not come out as it was."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from models.progress import Silent
from models.prune.vocabularies.corpus import LONGEST, Pass, compare, count, survey, texts_in
from models.prune.vocabularies.pieces import Pieces
from squeeze.errors import ArchitectureUnsupported, CertificationFailed, DataUnusable
from tests.models.prune.tokenizers_of import byte_level, model_with, words


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(byte_level(), tmp_path_factory.mktemp("model"))


def file_of(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_record_is_read_in_each_way_that_a_job_reads_it(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "ka?"}, {"role": "assistant", "content": "lo"}]
    rows = [{"text": "mi"}, {"prompt": "ru", "completion": " zu"}, {"messages": turns}]
    found = list(texts_in(file_of(tmp_path / "rows", *rows), None, tokenizer)())
    assert found == [
        ("line 1", "mi"),
        *(("line 2", text) for text in ("ru zu", "ru", " zu")),
        *(
            ("line 3", text)
            for text in ("ka?\nlo", "<|user|>\nka?</s>\n<|assistant|>\nlo</s>\n", "<|user|>\nka?</s>\n")
        ),
    ]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataUnusable, match=r"line 3.*must alternate"):
        list(texts_in(tmp_path / "rows", None, tokenizer)())


def test_a_very_long_text_is_read_in_pieces_with_what_stands_around_their_ends(tmp_path: Path, model: Path) -> None:
    text = "ka lo mi ten\n" * (LONGEST // 10)
    pieces = [piece for _, piece in texts_in(file_of(tmp_path / "long", {"text": text}), None, AutoTokenizer)()]
    assert max(map(len, pieces)) <= LONGEST and len(pieces) == 3
    assert pieces[0] + pieces[2] == text and pieces[1] in text and pieces[0][-100:] + pieces[2][:100] in pieces[1]


def test_a_file_without_any_text_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataUnusable, match="no text"):
        survey(texts_in(file_of(tmp_path / "none", {"text": ""}), None, AutoTokenizer.from_pretrained(model)))


def test_the_share_of_new_tokens_is_that_of_tokens_that_were_seen_once(tmp_path: Path, model: Path) -> None:
    tokenizer = byte_level()
    texts = texts_in(file_of(tmp_path / "few", {"text": "aaab"}), None, AutoTokenizer.from_pretrained(model))
    found = count(texts, [tokenizer], 704, Pass(tmp_path / "way", "mark", survey(texts), Silent(), 1.0))
    ids = tokenizer.encode("aaab").ids
    assert found.tokens == len(ids) and found.numbers == set(ids)
    assert found.new_share == sum(ids.count(one) == 1 for one in ids) / len(ids)


def test_a_text_that_would_come_out_otherwise_ends_the_job_and_is_shown(tmp_path: Path, model: Path) -> None:
    tokenizer = byte_level()
    rules = json.loads(tokenizer.to_str())
    rules["model"]["merges"] = rules["model"]["merges"][:-60]  # and not their tokens
    broken = Tokenizer.from_str(json.dumps(rules))
    texts = texts_in(
        file_of(tmp_path / "rows", *({"text": line} for line in words(1, 50))),
        None,
        AutoTokenizer.from_pretrained(model),
    )
    way = Pass(tmp_path / "way", "mark", survey(texts), Silent(), 1.0)
    with pytest.raises(CertificationFailed, match=r"line \d+ of the data gets other tokens"):
        compare(texts, [(tokenizer, broken)], torch.arange(704), way)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "WordPiece"}, "its model is WordPiece"),
        ({"dropout": 0.1}, "leaves out merges by chance"),
        ({"end_of_word_suffix": "</w>"}, "marks the middle or the end"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(change: dict[str, object], words: str) -> None:
    rules = json.loads(byte_level().to_str())
    with pytest.raises(ArchitectureUnsupported, match=words):
        Pieces(rules | {"model": rules["model"] | change})
