"""What there is to do is told of the whole job, so that its first step is not taken for all of it."""

from pathlib import Path

import pytest

from models.files.checkpoint import open_model
from models.work import with_what_follows
from squeeze.specs.job_spec import JobSpec
from tests.models import tiny

WIDTH = {"kind": "prune", "method": "width", "params_target": 0.8}
TAUGHT = {"kind": "distill", "method": "logits", "steps": 500, "batch_size": 8}
LEARNED = {"kind": "finetune", "method": "full", "steps": 500, "batch_size": 8}
ROUNDED = {"kind": "quantize", "method": "gptq", "group_size": 32}
ONE_OF_EACH = ((), (ROUNDED,), (LEARNED,), (TAUGHT,), (TAUGHT, ROUNDED))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("work") / "model")


def told(model: Path, *following: dict[str, object], text: Path | None = None) -> float:
    """All that a job is expected to take when its first step begins, of which one operation is its own."""
    data = {"source": "file-abcdefgh", "samples": 8, "sequence_length": 64}
    spec = JobSpec.model_validate({"model": "org/model", "steps": [WIDTH, *following], "data": data})
    return sum(with_what_follows({"compressing": 1.0}, open_model(model), spec, spec.steps[0], text).values())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("One word after the other. " * 2000, encoding="utf-8")
    return path


def test_what_follows_counts_as_what_comes_last(model: Path, text: Path) -> None:
    alone, rounded, learned, taught, both = (told(model, *following, text=text) for following in ONE_OF_EACH)
    assert alone == 1.0 < rounded < learned < taught < both


def test_a_training_for_as_long_as_its_text_is_counted_by_its_bytes(model: Path, text: Path) -> None:
    by_epochs = {name: value for name, value in LEARNED.items() if name != "steps"}
    once, twice, thrice = (told(model, by_epochs | {"epochs": epochs}, text=text) for epochs in (1, 2, 3))
    assert once < twice and thrice - twice == pytest.approx(twice - once, rel=0.1)
    assert told(model, by_epochs) == 1.0  # nobody knows how long
