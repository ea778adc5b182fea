"""Several real processes that share one quantization, against one process that does it alone."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.weights.quantized import block_files
from tests.models import tiny

RTN = {"kind": "quantize", "method": "rtn", "group_size": 32}
GPTQ = {"kind": "quantize", "method": "gptq", "group_size": 32}
AWQ = {"kind": "quantize", "method": "awq", "group_size": 32}

Ask = Callable[..., list[dict[str, Any]]]
Alone = Callable[[str, dict[str, Any]], tuple[Path, float]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Has a team run a case of `tests.models.teammates`."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.models.teammates"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        lines, answers = process.stdin, process.stdout

        def ask(model: Path, work: Path, step: dict[str, Any], size: int, **more: Any) -> list[dict[str, Any]]:
            case = {"model": str(model), "work": str(work), "step": step, "size": size} | more
            lines.write(json.dumps(case) + "\n")
            lines.flush()
            told: list[dict[str, Any]] = json.loads(answers.readline())
            return told

        yield ask


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny.FAMILIES["llama"](root / "llama", num_hidden_layers=3),
        "mixtral": tiny.FAMILIES["mixtral"](root / "mixtral"),
    }


@pytest.fixture(scope="module")
def alone(ask: Ask, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """(the work directory, the divergence) of one process that does a step alone; each once."""

    @functools.cache
    def run(family: str, step: str) -> tuple[Path, float]:
        work = tmp_path_factory.mktemp("alone") / "work"
        (told,) = ask(models[family], work, json.loads(step), 1)
        return work, told["divergence"]

    return lambda family, step: run(family, json.dumps(step))


def tensors(work: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in block_files(work) for name, tensor in load_file(path).items()}


def assert_same(team: Path, alone: Path) -> None:
    one, other = tensors(team), tensors(alone)
    assert one.keys() == other.keys()
    assert len(one) > 20
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("family", "step", "size"),
    [
        ("llama", RTN, 2),
        ("llama", GPTQ, 2),
        ("llama", GPTQ | {"asymmetric_calibration": True}, 2),
        ("mixtral", GPTQ, 2),
        ("mixtral", AWQ, 3),
        ("llama", {"kind": "quantize", "method": "smoothquant", "kv_cache": "fp8"}, 2),
    ],
)
def test_the_result_is_that_of_one_process_to_the_bit(
    ask: Ask, alone: Alone, models: dict[str, Path], tmp_path: Path, family: str, step: dict[str, Any], size: int
) -> None:
    work, divergence = alone(family, step)
    team = ask(models[family], tmp_path, step, size)
    assert [one["says"] for one in team] == ["done"] * size
    assert team[0]["divergence"] == divergence
    assert_same(tmp_path, work)


def test_where_inputs_do_not_fit_in_memory_next_to_no_code_differs(
    ask: Ask, alone: Alone, models: dict[str, Path], tmp_path: Path
) -> None:
    """Sums in another order: none of these 900,000 codes differed where this was written."""
    work, divergence = alone("mixtral", GPTQ)
    team = ask(models["mixtral"], tmp_path, GPTQ, 2, memory_bytes=0)
    assert team[0]["divergence"] == pytest.approx(divergence, rel=1e-3)
    one, other = tensors(tmp_path), tensors(work)
    codes = [name for name in one if name.endswith(".codes")]
    different = sum(int((one[name] != other[name]).sum()) for name in codes)
    assert different <= 1e-3 * sum(one[name].numel() for name in codes)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_fails_the_others_and_the_team_goes_on_after_the_last_block(
    ask: Ask, alone: Alone, models: dict[str, Path], tmp_path: Path, killed: int
) -> None:
    first = ask(models["llama"], tmp_path, GPTQ, 2, signals=[killed, 2, "SIGKILL"])
    assert first[killed] == {"says": "", "status": -9}
    assert first[1 - killed]["says"].startswith("ProcessKilled: One of the 2 processes that share this job ended")
    finished, _ = block_files(tmp_path)
    written = finished.stat().st_mtime_ns
    again = ask(models["llama"], tmp_path, GPTQ, 2)
    assert [one["says"] for one in again] == ["done"] * 2
    assert finished.stat().st_mtime_ns == written
    work, divergence = alone("llama", GPTQ)
    assert again[0]["divergence"] == divergence
    assert_same(tmp_path, work)


def test_a_process_that_does_not_answer_is_given_up(ask: Ask, models: dict[str, Path], tmp_path: Path) -> None:
    leader, _ = ask(models["llama"], tmp_path / "team", GPTQ, 2, signals=[1, 1, "SIGSTOP"], answer_seconds=3.0)
    assert leader["says"].startswith("ProcessKilled")
    assert "within 3 seconds" in leader["says"]


def test_a_team_of_another_size_starts_anew(ask: Ask, models: dict[str, Path], tmp_path: Path) -> None:
    ask(models["llama"], tmp_path / "team", GPTQ, 2, signals=[1, 1, "SIGKILL"])
    (one,) = ask(models["llama"], tmp_path / "team", GPTQ, 1)
    assert one["says"] == "done"
    assert not list((tmp_path / "team").glob("process-*"))


def test_fewer_sequences_than_processes_and_methods_on_whole_blocks_are_refused(
    ask: Ask, models: dict[str, Path], tmp_path: Path
) -> None:
    leader, _ = ask(models["llama"], tmp_path / "few", GPTQ, 2, samples=1)
    assert leader["says"] == (
        "DataUnusable: 1 calibration sequences can't be shared by 2 GPUs; give more data.samples, or fewer limits.gpus"
    )
    leader, _ = ask(models["llama"], tmp_path / "whole", {"kind": "quantize", "method": "autoround"}, 2)
    assert leader["says"].startswith("SpecInvalid: autoround works on whole blocks")
