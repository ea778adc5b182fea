"""The way of a whole job through this room: refused early, run to the end, killed and resumed, on a disk that fills."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.pipeline import Facts, Inputs, Outcome, check, run
from models.progress import Silent
from models.texts.data import evaluation_windows
from models.texts.material import read_tokenizer
from squeeze.errors import (
    ArchitectureUnsupported,
    DiskFull,
    FormatUnfit,
    GroupSizeIndivisible,
    ModelAlreadyCompressed,
    ModelMalformed,
)
from squeeze.objects import Stage
from squeeze.reports.report import Report
from tests.models.engine_parts import perplexity_in_transformers
from tests.models.job_parts import BOTH, Heard, digests, inputs_of, spec_of
from tests.models.tiny import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("family", "fields", "step", "changes", "error", "words", "param"),
    [
        (
            "llama",
            {"hidden_size": 160},
            {"group_size": 128},
            {},
            GroupSizeIndivisible,
            "32 and `channel`",
            "steps.0.group_size",
        ),
        (
            "llama",
            {"hidden_size": 192, "intermediate_size": 160, "head_dim": 32},
            {"group_size": 128},
            {},
            GroupSizeIndivisible,
            "for all layers 32 and `channel`",
            "steps.0.group_size",
        ),
        (
            "llama",
            {"num_key_value_heads": 1, "head_dim": 48},
            {"bits": 3},
            {},
            FormatUnfit,
            "2 or 4 or 8 bits",
            "formats",
        ),
        ("gpt2", {}, {}, {"formats": ["gptq"]}, FormatUnfit, "hold gpt2 models; compressed-tensors", "formats"),
        ("llama", {}, {"ignore": ["*"]}, {}, ModelMalformed, "no linear layer", "steps.0.ignore"),
        ("llama", {"num_hidden_layers": 0}, {}, {}, ModelMalformed, "no decoder blocks", None),
    ],
    ids=["group", "group that fits all layers", "words", "format", "ignore", "blocks"],
)
def test_what_can_t_work_is_refused_from_the_config_alone(
    tmp_path: Path,
    family: str,
    fields: dict[str, Any],
    step: dict[str, Any],
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    param: str | None,
) -> None:
    model = FAMILIES[family](tmp_path / "whole", **fields)
    (tmp_path / "model").mkdir()
    (model / "config.json").rename(tmp_path / "model" / "config.json")
    with pytest.raises(error, match=words) as refused:
        check(spec_of(step, **changes), tmp_path / "model")
    assert getattr(refused.value, "param", None) == param


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (b"", ModelMalformed),
        (b"[]", ModelMalformed),
        (b"[" * 100_000, ModelMalformed),
        (b"\xff\xfe{}", ModelMalformed),
        (b"{}", ModelMalformed),
        (b'{"model_type": ["llama"]}', ModelMalformed),
        (b'{"model_type": "llama", "vocab_size": "many"}', ModelMalformed),
        (b'{"model_type": "mamba"}', ArchitectureUnsupported),
        (b'{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', ModelAlreadyCompressed),
        (None, ModelMalformed),
    ],
    ids=["empty", "list", "deep", "not UTF-8", "no type", "types", "word", "unknown", "quantized", "none"],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, config: bytes | None, error: type[Exception]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(error):
        check(spec_of(), tmp_path)


def test_a_model_that_can_be_compressed_is_told_in_figures(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    assert check(spec_of(), model) == Facts("llama", 2, 14)
    assert check(spec_of({"ignore": ["*.1.*"]}), model) == Facts("llama", 2, 7)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "upload"
    path.write_text("\n".join(" ".join(f"word{dice.randrange(300)}" for _ in range(60)) for _ in range(400)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("source") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> tuple[Inputs, Outcome, Heard]:
    inputs, heard = inputs_of(spec_of(), model, text, tmp_path_factory.mktemp("finished")), Heard()
    return inputs, run(inputs, heard), heard


def test_a_job_ends_with_what_its_report_says(finished: tuple[Inputs, Outcome, Heard], model: Path, text: Path) -> None:
    inputs, outcome, heard = finished
    report = outcome.report
    assert Report.model_validate_json((inputs.out / "report.json").read_text()) == report
    assert sorted(path.name for path in inputs.out.iterdir()) == [*BOTH, "report.json"]
    assert heard.stages == [
        Stage.planning,
        Stage.loading,
        Stage.calibrating,
        Stage.compressing,
        Stage.evaluating,
        Stage.exporting,
        Stage.certifying,
    ]

    assert (report.source.model, report.source.revision, report.source.license) == ("org/model", "0123abc", "mit")
    assert report.source.bytes == sum(file.stat().st_size for file in model.glob("*.safetensors")) - header_bytes(model)
    assert (report.source.architecture, report.source.dtype) == ("llama", "float32")
    assert report.recipe[0]["damping"] == 0.01  # a default, written out
    assert report.bits_per_weight == 4.5
    assert report.calibration is not None and not report.calibration.generic
    assert [block.index for block in report.blocks] == [0, 1, 2, 3]
    assert all(len(block.layers) == 7 and 0 < (block.relative_error or 0) < 1 for block in report.blocks)
    assert all(0 < layer.relative_error < 0.1 for block in report.blocks for layer in block.layers)
    assert set(report.spent.seconds) == {"loading", "compressing", "evaluating", "exporting", "certifying"}
    assert set(report.spent.work) == set(report.spent.seconds) and min(report.spent.work.values()) > 0
    assert [warning for warning in report.warnings if "few for layers" in warning]
    assert set(report.warnings) <= set(heard.messages)


def test_the_figures_are_those_of_the_source_and_of_the_result(
    finished: tuple[Inputs, Outcome, Heard], model: Path, text: Path
) -> None:
    _, outcome, _ = finished
    quality, result = outcome.report.quality, outcome.result
    assert quality is not None and quality.perplexity_before is not None and quality.divergence_nats is not None
    windows = evaluation_windows(read_tokenizer(model), text, None, True, 4, 64, None)
    assert quality.text.sha256 == windows.text.sha256
    assert quality.scored_tokens == 4 * 63
    assert quality.perplexity_before == pytest.approx(perplexity_in_transformers(model, windows), rel=1e-3)
    assert 0 < quality.divergence_nats < 1
    assert 0.3 < (quality.top1_agreement or 0) < 1

    assert (result.perplexity_before, result.perplexity_after) == (quality.perplexity_before, quality.perplexity_after)
    assert {name: verdicts["transformers"] for name, verdicts in result.certified.items()} == dict.fromkeys(
        BOTH, "passed"
    )
    for size in outcome.report.sizes:
        files = [file for file in outcome.directories[size.format].iterdir() if file.name != "README.md"]
        assert size.weight_bytes == (outcome.directories[size.format] / "model.safetensors").stat().st_size
        assert size.bytes == result.result_bytes[size.format] == sum(file.stat().st_size for file in files)
        assert size.ratio == pytest.approx(outcome.report.source.bytes / size.weight_bytes)


def test_the_cards_tell_origin_recipe_and_figures(finished: tuple[Inputs, Outcome, Heard]) -> None:
    _, outcome, _ = finished
    for name in BOTH:
        card = (outcome.directories[name] / "README.md").read_text()
        assert 'base_model: "org/model"' in card and 'license: "mit"' in card
        assert f"{outcome.result.perplexity_after:.4g}" in card
        assert "**quantize** by `gptq`" in card
        assert "transformers" in card and "passed" in card


def test_a_pattern_that_matches_nothing_is_a_warning(tmp_path: Path, text: Path) -> None:
    inputs = inputs_of(spec_of({"ignore": ["model.layer.0.*", "lm_head"]}), tmp_path / "model", text, tmp_path)
    FAMILIES["llama"](inputs.model, num_hidden_layers=1)
    heard = Heard()
    with pytest.raises(Stopped):
        run(inputs, Stops(heard))
    (warning,) = [message for message in heard.messages if "ignore" in message]
    assert "'model.layer.0.*' matches no layer" in warning


class Stopped(Exception):
    pass


class Stops(Silent):
    """Passes on what is told, and ends the run at the first block."""

    def __init__(self, heard: Heard) -> None:
        self.event = heard.event  # type: ignore[method-assign]

    def advance(self, done: int, total: int, unit: str) -> None:
        raise Stopped


def killed(room: Path, model: Path, text: Path, where: str) -> list[str]:
    """Runs a job in a process that kills itself at `where`; what it told before."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.models.killed", str(model), str(text), str(room), where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return ended.stdout.splitlines()


def test_a_job_killed_at_any_moment_ends_with_the_same_files(
    finished: tuple[Inputs, Outcome, Heard], tmp_path: Path, model: Path, text: Path
) -> None:
    expected = digests(finished[0].out)
    killed(tmp_path, model, text, "blocks 3")
    told = killed(tmp_path, model, text, "exporting gptq")
    assert any("going on after block 2 of 4" in line for line in told)
    # One format is there whole, of the other nothing is under its final name.
    assert digests(tmp_path / "out") == {n: d for n, d in expected.items() if n.startswith("compressed-tensors/")} | {
        name: digest for name, digest in digests(tmp_path / "out").items() if name.startswith(".gptq.partial/")
    }
    told = killed(tmp_path, model, text, "certifying")
    assert any("going on after block 4 of 4" in line for line in told)
    assert digests(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes."""
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        how = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
        if os.geteuid() != 0 or subprocess.run(how, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk takes root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("size_bytes", [16_000, 300_000, 800_000])
@pytest.mark.parametrize("what", ["work", "out"])
def test_a_disk_that_fills_is_told_and_leaves_nothing_torn(
    small_disk: Callable[[int], Path],
    finished: tuple[Inputs, Outcome, Heard],
    tmp_path: Path,
    model: Path,
    text: Path,
    what: str,
    size_bytes: int,
) -> None:
    whole = finished[0]
    disk = small_disk(size_bytes)
    inputs = inputs_of(spec_of(), model, text, tmp_path / "room")
    if what == "out":
        inputs = dataclasses.replace(inputs, work=whole.work)  # nothing is left to compute
    with pytest.raises(DiskFull, match="free space"):
        run(dataclasses.replace(inputs, **{what: disk / what}), Silent())
    left = disk / what
    kept = whole.out if what == "out" else whole.work
    finals = [file for file in left.rglob("*") if file.is_file() and ".part" not in file.as_posix()]
    for file in finals:
        assert file.stat().st_size == (kept / file.relative_to(left)).stat().st_size, file
    if what == "out":
        assert not any(path.name.startswith(".") for path in left.iterdir())


@pytest.mark.parametrize("change", ["config", "weights"])
def test_what_another_model_left_is_not_resumed_from(tmp_path: Path, text: Path, change: str) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    inputs = dataclasses.replace(inputs_of(spec_of(), model, text, tmp_path), revision=None)
    with pytest.raises(Stopped):
        run(inputs, StopsAt(2))
    if change == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    else:
        FAMILIES["llama"](model, seed=1)
    heard = StopsAt(1)
    with pytest.raises(Stopped):
        run(inputs, heard)
    assert not any("going on" in message for message in heard.messages)


class StopsAt(Heard):
    """Ends the run once so many blocks are done."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self._blocks = blocks

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "blocks" and done == self._blocks:
            raise Stopped


def header_bytes(model: Path) -> int:
    with (model / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_what_only_some_jobs_need_takes_no_memory_of_the_others() -> None:
    asked = "import sys, models.pipeline; print({'peft', 'gptqmodel', 'bitsandbytes', 'onnx'} & sys.modules.keys())"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
