"""Quantization-aware training: whole jobs of tiny models, what is learned, what an interrupted one goes on to."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from models.pipeline import run
from tests.models.job_parts import Heard, digests, inputs_of, spec_of
from tests.models.tiny import FAMILIES

QUICK: dict[str, Any] = {"method": "qat", "bits": 2, "steps": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def test_a(tmp_path: Path, model: Path) -> None:
    outcome = run(inputs_of(spec_of(QUICK), model, None, tmp_path), Heard())
    report = outcome.report
    print(
        report.tuning.model_copy(update={"curve": []}),
        [c.loss for c in report.tuning.curve],
        report.quality,
        report.certificates,
        report.blocks[0].layers[0],
    )
