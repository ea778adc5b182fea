"""From text to tokens: where they come from, that the parts never mix, and what is refused."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from models.texts.data import calibration_batches, digest, evaluation_windows
from models.texts.generic import standard_library
from squeeze.errors import DataUnusable
from tests.models import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.FAMILIES["llama"](tmp_path_factory.mktemp("tokenizer") / "model"))


def words(count: int, seed: int) -> str:
    dice = random.Random(seed)
    return " ".join(
        dice.choice(["red", "green", "blue", "seven", "house", "river"]) + str(dice.random()) for _ in range(count)
    )


def test_the_generic_text_is_split_by_module_and_never_overlaps():
    train, held_out = ({name for name, _ in standard_library(split)} for split in ("train", "held_out"))
    assert train and held_out and not train & held_out
    assert 0.05 < len(held_out) / len(train | held_out) < 0.2


def test_the_draw_is_decided_by_the_seed_alone(tokenizer):
    one, same, other = (calibration_batches(tokenizer, None, None, 4, 32, seed).ids for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (4, 32) and one.dtype == torch.int64


@pytest.mark.parametrize("kind", ["plain", "jsonl text", "jsonl prompt", "jsonl messages", "parquet"])
def test_every_kind_of_file_gives_its_text(tokenizer, tmp_path, kind):
    documents = [words(60, seed) for seed in range(40)]
    path = tmp_path / "upload"
    if kind == "plain":
        path.write_text("\n".join(documents))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": documents}), path)
    else:
        rows = {
            "jsonl text": [{"text": d} for d in documents],
            "jsonl prompt": [{"prompt": d[:50], "completion": d[50:]} for d in documents],
            "jsonl messages": [{"messages": [{"role": "user", "content": d}]} for d in documents],
        }[kind]
        path.write_text("\n".join(json.dumps(row) for row in rows))
    calibration = calibration_batches(tokenizer, path, "file-x", 4, 64, seed=0)
    assert calibration.text.origin == "file-x" and not calibration.text.generic
    text = tokenizer.decode(calibration.ids.flatten())
    assert "river" in text or "house" in text
    assert calibration.text.sha256 == digest(calibration.ids)


def test_calibration_and_evaluation_of_one_file_never_see_the_same_passage(tokenizer, tmp_path):
    path = tmp_path / "upload.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document number {n} " + words(30, n)}) for n in range(300)))
    calibration = calibration_batches(tokenizer, path, None, 4000, 64, seed=0)
    windows = evaluation_windows(tokenizer, path, None, True, 4000, 64, stride=None)
    numbers = []
    for ids in (calibration.ids, windows.ids):
        text = tokenizer.decode(ids.flatten())
        numbers.append({part.split()[0] for part in text.split("document number ")[1:] if part.split()})
    assert len(numbers[0]) > 100 and len(numbers[1]) > 10
    assert not numbers[0] & numbers[1]


def test_strides_score_every_token_once(tokenizer):
    windows = evaluation_windows(tokenizer, None, None, True, samples=5, length=32, stride=8)
    assert windows.first_scored == (1, 24, 24, 24, 24)
    assert windows.scored_tokens == 31 + 4 * 8
    for before, after in zip(windows.ids, windows.ids[1:], strict=False):
        assert torch.equal(before[8:], after[:-8])


def test_a_short_file_gives_fewer_sequences_and_a_tiny_one_is_refused(tokenizer, tmp_path):
    path = tmp_path / "upload.txt"
    path.write_text(words(50, 0))
    assert 1 <= len(calibration_batches(tokenizer, path, None, 1000, 32, seed=0).ids) < 1000
    path.write_text("too short")
    with pytest.raises(DataUnusable, match=r"has \d+ tokens; at least 16"):
        calibration_batches(tokenizer, path, None, 8, 32, seed=0)
    path.write_text("")
    with pytest.raises(DataUnusable):
        evaluation_windows(tokenizer, path, None, False, 8, 32, stride=None)


@pytest.mark.parametrize(
    ("content", "words_of_error"), [('{"text": "x"}\n{broken', "line 2"), ('{"body": "x"}', "none of `text`")]
)
def test_a_broken_record_is_named_by_its_line(tokenizer, tmp_path, content, words_of_error):
    path = tmp_path / "upload.jsonl"
    path.write_text(content)
    with pytest.raises(DataUnusable, match=words_of_error):
        calibration_batches(tokenizer, path, None, 8, 32, seed=0)


def test_a_small_file_too_has_a_held_out_part_and_no_word_is_cut(tokenizer, tmp_path):
    for seed in range(20):
        path = tmp_path / f"upload-{seed}"
        path.write_text(" ".join(f"<{number}-{seed}>" for number in range(6000)))
        windows = evaluation_windows(tokenizer, path, None, True, 4, 64, stride=None)
        assert windows.ids.shape == (4, 64)
        text = tokenizer.decode(windows.ids[0]).split(tokenizer.bos_token)
        assert all(part.lstrip().startswith("<") for part in text if part.strip())


def test_a_directory_is_read_file_after_file_and_another_column_than_the_usual(tokenizer, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "00000").write_text("".join(json.dumps({"body": words(40, n), "text": "no"}) + "\n" for n in range(9)))
    (folder / "00001").write_text("".join(json.dumps({"body": words(40, n)}) + "\n" for n in range(9, 200)))
    calibration = calibration_batches(tokenizer, folder, "hub:o/d@0123:train", 16, 64, 0, "body")
    assert calibration.ids.shape == (16, 64) and calibration.text.origin == "hub:o/d@0123:train"
    windows = evaluation_windows(tokenizer, folder, None, True, 4, 64, None, "body")
    assert windows.ids.shape == (4, 64)
    with pytest.raises(DataUnusable, match="none of `title`") as refused:
        calibration_batches(tokenizer, folder, None, 16, 64, 0, "title")
    assert refused.value.param == "data.source"
