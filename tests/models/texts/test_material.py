"""What is read beside the weights: tokenizers and settings that are missing, broken or of another model."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.files.checkpoint import open_model
from models.formats.directory import refuse_broken_companions
from models.texts.material import Material, read_tokenizer
from squeeze.errors import DataUnusable, ModelMalformed, ModelUnsafe
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import RTN
from tests.models.engine_parts import frame_of
from tests.models.tiny import FAMILIES, VOCABULARY

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
STEP = RTN(method="rtn", group_size=32)


@pytest.mark.parametrize(
    ("family", "settings", "error", "words"),
    [
        ("llama", {}, ModelMalformed, "missing or can't be loaded.*tokenizer.json"),
        ("gpt2", {}, ModelMalformed, "no vocabulary"),
        ("llama", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["o.Own", None]}}, ModelUnsafe, "never run"),
    ],
)
def test_a_directory_without_a_tokenizer_that_works_is_refused(
    tmp_path: Path, family: str, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = FAMILIES[family](tmp_path / "model")
    (model / TOKENIZER).unlink()
    (model / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(error, match=words) as refused:
        read_tokenizer(model)
    assert str(tmp_path) not in str(refused.value)


def test_a_sentencepiece_model_alone_asks_for_the_file_that_is_read_here(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    (model / TOKENIZER).unlink()
    (model / "tokenizer.model").write_bytes(b"\x0a\x0bgarbage")
    with pytest.raises(ModelMalformed, match=r"tokenizer\.json"):
        read_tokenizer(model)


def test_a_tokenizer_needs_no_settings_and_no_first_token(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    (model / SETTINGS).unlink()
    tokenizer = read_tokenizer(model)
    assert tokenizer.bos_token is None
    assert material(model, tokenizer, {}).windows is not None


def test_a_tokenizer_that_knows_more_than_the_model_is_of_another_model(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", vocab_size=VOCABULARY // 2)
    with pytest.raises(ModelMalformed, match="not of one model"):
        material(model, read_tokenizer(model), {})


def test_a_sequence_is_cut_to_the_model_s_positions_and_a_model_with_too_few_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", max_position_embeddings=32)
    found = material(model, read_tokenizer(model), {"sequence_length": 4096})
    assert found.windows is not None and found.windows.ids.shape[1] == 32
    assert "sequence_length 4096 was cut to the model's 32 positions" in found.warnings()
    tiny = FAMILIES["llama"](tmp_path / "tiny", max_position_embeddings=8)
    with pytest.raises(DataUnusable, match="8 positions"):
        material(tiny, read_tokenizer(tiny), {})


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json", SETTINGS])
@pytest.mark.parametrize("content", [b'{"a":', b"\xff{}", b"[" * 100_000], ids=["cut", "not UTF-8", "deep"])
def test_broken_settings_are_named_before_the_work(tmp_path: Path, name: str, content: bytes) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    (model / name).write_bytes(content)
    with pytest.raises(ModelMalformed, match=name):
        refuse_broken_companions(open_model(model))


def material(model: Path, tokenizer: Any, data: dict[str, Any]) -> Material:
    spec = JobSpec.model_validate(
        {"model": "org/model", "steps": [STEP], "data": {"sequence_length": 64} | data, "evaluation": {"samples": 2}}
    )
    return Material(spec, STEP, tokenizer, frame_of(model), None, None)
