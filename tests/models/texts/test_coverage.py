"""Texts that a tokenizer does not cover, or that repeat themselves, are warned of with figures; others are not."""

import base64
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.texts.coverage import coverage, coverage_warnings, repeated_share, repetition_warnings
from models.texts.data import calibration_batches
from models.texts.material import Material, read_tokenizer
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import GPTQ
from tests.models.engine_parts import frame_of
from tests.models.tiny import FAMILIES

BUNDLED = Path(__file__).resolve().parents[3] / "models" / "bundled"
PROSE = (
    "It was late in the afternoon when the old man came down to the harbour, and nobody who saw him there could tell "
    "whether he had been waiting for the ship or merely for the evening. He spoke “to himself”, as many do who have "
    "lived alone for a long time; the café behind him was already closed, and the wind blew through its doors."
)
Words = Callable[[random.Random], str]
TEXTS: dict[str, Words] = {
    "english": lambda dice: dice.choice(PROSE.split()) + " ",
    "source code": lambda dice: (
        f"    if {dice.choice('abcdef')} is None:\n        return self.value[{dice.random()}]\n"
    ),
    "russian": lambda dice: "".join(dice.choice("оеаинтсрвлкмдпуяыьгз") for _ in range(dice.randint(2, 9))) + " ",
    "chinese": lambda dice: chr(dice.randint(0x4E00, 0x7FFF)),
    "base64": lambda dice: base64.b64encode(dice.randbytes(30)).decode(),
}
FOREIGN = ("russian", "chinese", "base64")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(BUNDLED)


def text(kind: str, count: int = 20_000) -> str:
    dice = random.Random(0)
    return "".join(TEXTS[kind](dice) for _ in range(count))


def ids_of(tokenizer: Any, tmp_path: Path, content: str) -> torch.Tensor:
    path = tmp_path / "text.txt"
    path.write_text(content)
    return calibration_batches(tokenizer, path, None, 64, 128, seed=0).ids


@pytest.mark.parametrize("kind", TEXTS)
def test_what_the_tokenizer_does_not_cover_is_warned_of_and_nothing_else(
    tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    ids = ids_of(tokenizer, tmp_path, text(kind))
    found = coverage_warnings(tokenizer, ids, "calibration text")
    assert bool(found) is (kind in FOREIGN), coverage(tokenizer, ids)
    if found:
        assert "bytes a token where generic text gives" in found[0]


def test_the_figures_are_those_of_a_count_by_hand(tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer("жук and €", add_special_tokens=False)["input_ids"]])
    broken = sum("\ufffd" in tokenizer.decode([token]) for token in ids[0].tolist())
    assert broken >= 6
    found = coverage(tokenizer, ids)
    assert found.pieces == broken / ids.numel()
    assert found.bytes_per_token == len("жук and €".encode()) / ids.numel()
    assert found.unknown == 0.0


def test_words_that_a_tokenizer_has_no_token_for_are_counted() -> None:
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]")
    ids = torch.tensor([words("a b c a")["input_ids"]])
    assert coverage(words, ids).unknown == 0.25
    assert "25% of the calibration text is the unknown token" in coverage_warnings(words, ids, "calibration text")[0]


def test_a_text_of_copies_is_warned_of_and_its_first_copy_counts(tokenizer: Any, tmp_path: Path) -> None:
    once = text("english", 600)
    repeated, plain = (ids_of(tokenizer, tmp_path, content) for content in (once * 20, text("english")))
    assert repeated_share(plain) == 0.0 and repetition_warnings(plain, "calibration text") == []
    assert 0.3 < repeated_share(repeated) < 0.96
    assert "of the calibration text repeats itself" in repetition_warnings(repeated, "calibration text")[0]


def test_runs_are_counted_row_by_row() -> None:
    row = torch.arange(40)
    assert repeated_share(row[None]) == 0.0
    assert repeated_share(torch.stack([row, row])) == 0.5
    assert repeated_share(torch.stack([row, row + 1000])) == 0.0
    assert repeated_share(torch.zeros(1, 40, dtype=torch.int64)) == pytest.approx(8 / 9)
    assert repeated_share(torch.stack([row[:10], row[:10]])) == 0.5  # shorter than a run


@pytest.mark.parametrize(
    ("source", "evaluation", "texts"),
    [("file-calibration", None, "calibration"), (None, "file-evaluation", "evaluation"), (None, None, "")],
)
def test_a_job_is_warned_of_the_text_that_it_gave(
    tmp_path: Path, source: str | None, evaluation: str | None, texts: str
) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    (tmp_path / "text").write_text(text("chinese", 60_000))
    step = GPTQ(method="gptq", group_size=32)
    spec = JobSpec.model_validate(
        {
            "model": "org/model",
            "steps": [step],
            "data": {"samples": 8, "sequence_length": 64, "source": source},
            "evaluation": {"samples": 2, "source": evaluation},
        }
    )
    files = [tmp_path / "text" if named else None for named in (source, evaluation)]
    warnings = Material(spec, step, read_tokenizer(model), frame_of(model), *files).warnings()
    found = [one for one in warnings if "hardly covers the" in one]
    assert len(found) == bool(texts)
    assert not texts or f"the {texts} text" in found[0]
