"""A trimmed vocabulary in a whole job: certified alone, and what goes on with it, which reads the trimmed tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.job import Outcome
from models.pipeline import run
from squeeze.specs.job_spec import JobSpec
from tests.models.job_parts import Heard, inputs_of
from tests.models.prune.slim_parts import spec_of
from tests.models.prune.tokenizers_of import byte_level, model_with, words
from tests.models.prune.trim_parts import UNSEEN

TRIM = {"method": "vocabulary"}


def job(room: Path, spec: JobSpec, other: bool = False) -> tuple[Path, Outcome]:
    """other: whether the evaluation text is another one."""
    model = model_with(byte_level(), room / "model", num_hidden_layers=3)
    rows = ({"prompt": line, "completion": " lo"} for line in words(8, 120))
    (room / "text").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (room / "other").write_text("\n".join([*UNSEEN, *words(5, 40)]), encoding="utf-8")
    inputs = inputs_of(spec, model, room / "text", room)
    return model, run(dataclasses.replace(inputs, evaluation_text=room / "other" if other else None), Heard())


@pytest.mark.slow
def test_a_job_of_it_alone_ends_certified_and_tells_what_other_text_takes(tmp_path: Path) -> None:
    spec = spec_of(TRIM, evaluation={"samples": 4, "source": "file-otherother"})
    model, outcome = job(tmp_path, spec, other=True)
    told = outcome.report.slimming and outcome.report.slimming.trimming
    assert told is not None and told.unseen is not None
    before, after = (AutoTokenizer.from_pretrained(one) for one in (model, outcome.directories["safetensors"]))
    text = (tmp_path / "other").read_text()
    counts = [len(one(text, add_special_tokens=False)["input_ids"]) for one in (before, after)]
    assert [told.unseen.tokens_before, told.unseen.tokens_after] == counts and counts[0] < counts[1]
    assert 0.5 < told.unseen.covered < 1 and told.unseen.origin == "file-otherother"
    assert told.unseen.bytes == len(text.encode()) >= told.unseen.measured_bytes
    assert told.unseen.bits_per_byte_before > 0 and told.unseen.bits_per_byte_after > 0
    assert outcome.report.certificates[0].outcome == "passed" and outcome.report.quality is not None
    assert outcome.report.quality.divergence_nats == pytest.approx(0, abs=1e-5)
    assert outcome.result.compression_ratio and outcome.result.compression_ratio > 1
    card = (outcome.directories["safetensors"] / "README.md").read_text()
    assert f"Vocabulary trimmed to {told.rows_after} of {told.rows_before} tokens" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ([{"kind": "quantize", "method": "rtn", "group_size": 32}], {"formats": ["compressed-tensors", "gptq"]}),
        ([{"kind": "quantize", "method": "rtn", "group_size": 32}], {"formats": ["gguf", "onnx"]}),
        ([{"kind": "finetune", "method": "lora", "merge": True, "epochs": 1, "learning_rate": 1e-3}], {}),
        ([{"kind": "distill", "method": "logits", "student": {"layers": 2}, "tokens": 4096}], {}),
        (
            [
                {"kind": "prune", "method": "depth", "blocks": 2},
                {"kind": "distill", "method": "logits", "tokens": 4096},
            ],
            {},
        ),
    ],
)
def test_what_follows_goes_on_with_it(tmp_path: Path, more: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    _, outcome = job(tmp_path, spec_of(TRIM, *more, **fields))
    own = outcome.report.slimming or outcome.report.rounds[0].slimming
    trimming = own and (own.trimming or (outcome.report.rounds and outcome.report.rounds[0].slimming.trimming))
    assert trimming
    assert all(one.outcome != "failed" for one in outcome.report.certificates)
    for name, directory in outcome.directories.items():
        if name == "safetensors":
            result = AutoModelForCausalLM.from_pretrained(directory)
            assert len(result.get_input_embeddings().weight) == trimming.rows_after
            assert max(AutoTokenizer.from_pretrained(directory).get_vocab().values()) < trimming.rows_after
