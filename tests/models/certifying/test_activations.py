"""Certification of results whose consumers round activations, and what all layouts take in memory."""

from pathlib import Path
from typing import Any

import pytest

from models.certifying.certify import certify
from models.files.checkpoint import tensor_entries
from models.formats import layout
from models.formats.compressed_tensors_parts import weights_in
from models.measuring.evaluation import measure
from models.progress import Silent
from squeeze.reports.report import Certificate
from squeeze.steps.quantization import FP8, MXFP4, RTN, Quantize, SmoothQuant
from tests.models.engine_parts import compressed, frame_of, thrown
from tests.models.tiny import llama


def certified(model: Path, room: Path, step: Quantize, **changes: Any) -> tuple[Certificate, float]:
    """What transformers says of a result, and the perplexity that its weights have where nothing else is rounded."""
    windows, frame = thrown(2, 48), frame_of(model)
    done, _ = compressed(model, room / "work", step, windows)
    measured = measure(frame, windows, done.activations.original, done.activations.compressed, Silent())
    layout("compressed-tensors").write(frame.source, done.model, room / "out", Silent())
    arguments: dict[str, Any] = {
        "expected": measured.nll_after,
        "windows": windows,
        "source_bytes": frame.source.weight_bytes,
        "dtype": frame.dtype,
        "device": "cpu",
        "consumers": {},
        "notify": Silent(),
    }
    certificate = certify(room / "out", "compressed-tensors", **(arguments | changes))[0]
    return certificate, measured.quality.perplexity_before or 0.0


def test_activations_are_rounded_with_the_weights_on_disk_too(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", num_hidden_layers=1)

    certificate, before = certified(model, tmp_path, FP8(method="fp8", activations="static"), memory_limit_bytes=1)

    assert certificate.outcome == "passed"
    assert "on disk" in certificate.detail
    assert certificate.tolerance is not None
    assert certificate.tolerance > 0.01  # each consumer rounds in its own arithmetic
    assert certificate.perplexity == pytest.approx(certificate.expected_perplexity, rel=1e-4)
    assert certificate.perplexity != pytest.approx(before, rel=1e-4)


def test_stored_weights_are_counted_in_every_layout(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", num_hidden_layers=1)
    steps: list[Quantize] = [
        RTN(method="rtn", bits=3, group_size=32),
        SmoothQuant(method="smoothquant"),
        FP8(method="fp8"),
        MXFP4(method="mxfp4"),
    ]
    for step in steps:
        done, _ = compressed(model, tmp_path / f"work-{step.method}", step, thrown(2, 48))
        out = tmp_path / step.method
        layout("compressed-tensors").write(frame_of(model).source, done.model, out, Silent())
        entries = tensor_entries(out)
        counted = sum(weights_in(name, entries) or 0 for name in entries)
        assert counted == sum(site.rows * site.columns for site in done.model.sites.values())
