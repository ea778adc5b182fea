"""The model card, read back as the Hub reads it."""

import json
from pathlib import Path
from typing import Any

import yaml

from models.card import write_card
from squeeze.reports.parts import Quality, Text
from squeeze.reports.report import Certificate, Report, Size, Source, Spent
from squeeze.reports.training import Training, TrainingData

TEXT = Text(
    origin="standard library of Python 3.11",
    generic=True,
    sequences=128,
    sequence_length=512,
    tokens=65536,
    sha256="0" * 64,
)
QUALITY = Quality(
    text=TEXT.model_copy(update={"sequences": 32}),
    stride=512,
    protocol="windows of 512 tokens every 512",
    scored_tokens=16352,
    perplexity_before=12.345,
    perplexity_after=12.678,
    divergence_nats=0.0123,
    top1_agreement=0.945,
)


def report(**changes: Any) -> Report:
    source: dict[str, Any] = {
        "model": "org/some-model@main",
        "revision": "a" * 40,
        "architecture": "llama",
        "parameters": 5_000_000,
        "bytes": 10_000_000,
        "dtype": "bfloat16",
        "license": "apache-2.0",
    } | changes.pop("source", {})
    fields: dict[str, Any] = {
        "squeeze": "0.1.0",
        "libraries": {},
        "device": "CPU",
        "source": Source(**source),
        "recipe": [
            {"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 128, "symmetric": True, "ignore": []}
        ],
        "seed": 7,
        "calibration": TEXT,
        "quality": QUALITY,
        "bits_per_weight": 4.125,
        "sizes": [Size(format="gptq", bytes=4_500_000, weight_bytes=4_000_000, ratio=2.5)],
        "blocks": [],
        "damping_escalations": 0,
        "certificates": [
            Certificate(format="gptq", consumer="transformers", version="5.23.0", outcome="passed", detail="loaded"),
            Certificate(format="gptq", consumer="vllm", version=None, outcome="not checked", detail="none is set"),
        ],
        "warnings": [],
        "spent": Spent(seconds={}, cpu_seconds=1, gpu_seconds=0, peak_host_bytes=1, peak_gpu_bytes=0),
    }
    return Report(**(fields | changes))


def card(directory: Path, told: Report) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card."""
    (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    write_card(directory, "gptq", told)
    empty, front, text = (directory / "README.md").read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


def test_the_front_matter_names_base_relation_license_and_tags(tmp_path: Path) -> None:
    front, _ = card(tmp_path, report())

    assert front == {
        "base_model": "org/some-model",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["squeeze", "gptq", "4-bit"],
    }


def test_the_text_gives_recipe_revision_figures_and_how_they_were_measured(tmp_path: Path) -> None:
    _, text = card(tmp_path, report())

    assert f"`org/some-model@main`, revision `{'a' * 40}`" in text
    assert "1. **quantize** by `gptq`: bits 4, group_size 128, symmetric true, ignore []" in text
    assert "| Perplexity | 12.35 | 12.68 |" in text
    assert "| Divergence from the original, nats a token | 0 | 0.0123 |" in text
    assert "| Same most likely token | 100 % | 94.5 % |" in text
    assert "| Weights | 10.0 MB | 4.0 MB (2.50 times smaller) |" in text
    assert "128 sequences of 512 tokens of standard library of Python 3.11, drawn with seed 7" in text
    assert "windows of 512 tokens every 512" in text
    assert "That text is generic" in text
    assert "transformers 5.23.0: passed; loaded" in text
    assert "vllm: not checked; none is set" in text
    assert "vllm serve" not in text


def test_a_directory_of_the_machine_is_told_by_its_name_alone_and_is_no_base_model(tmp_path: Path) -> None:
    front, text = card(tmp_path, report(source={"model": "/srv/private/llama-7b", "revision": None, "license": None}))

    assert "base_model" not in front
    assert "license" not in front
    assert "/srv/private" not in text
    assert "Made from `llama-7b` (llama" in text


def test_a_job_that_measured_nothing_claims_nothing(tmp_path: Path) -> None:
    _, text = card(tmp_path, report(quality=None, calibration=None))

    assert "Perplexity" not in text
    assert "Calibrated" not in text


def test_the_lines_that_load_the_model_are_python(tmp_path: Path) -> None:
    _, text = card(tmp_path, report())

    lines = compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert {"transformers", "from_pretrained"} <= set(lines.co_names)


def test_an_adapter_and_what_it_stands_beside_each_say_what_is_theirs(tmp_path: Path) -> None:
    data = TrainingData(
        origin="file-abcdefgh",
        held_out_origin="file-abcdefgh",
        records=9,
        held_out_records=1,
        examples=9,
        held_out_examples=1,
        tokens=90,
        learned_tokens=80,
        sha256="",
        held_out_sha256="",
    )
    training = Training.model_construct(data=data, steps=5, loss_before=4.5, loss_after=3.25, precision="fp32")
    step = {"kind": "finetune", "method": "qlora", "base": "gptq"}
    sizes = [
        Size(format="gptq", bytes=5, weight_bytes=4, ratio=2.5),
        Size(format="peft", bytes=2, weight_bytes=1, ratio=None),
    ]
    told = report(recipe=[step], training=training, sizes=sizes)
    front, base = card(tmp_path, told)
    write_card(tmp_path, "peft", told)
    adapter = (tmp_path / "README.md").read_text()

    assert front["base_model_relation"] == "quantized" and "gptq at 4 bits (gptq)" in base
    assert "| Perplexity | 12.35 | 12.68 |" in base and "Perplexity" not in adapter
    assert "| Held-out loss of the training, nats a token | 4.5000 | 3.2500 |" in adapter and "Held-out" not in base
    assert "Trained on 80 tokens" in adapter and "Nothing of it was trained" in base
    assert "beside the `gptq` result of the same job" in adapter and "optimum gptqmodel" in adapter
    lines = adapter.split("```python\n")[1].split("```")[0]
    assert "from_pretrained(rounded" in lines
    compile(lines, "card", "exec")
