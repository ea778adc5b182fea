"""Certification with the real consumers in real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.certifying.certify import certify
from models.formats import layout
from models.progress import Silent
from models.texts.data import Windows
from squeeze.errors import CertificationFailed, ProcessKilled
from squeeze.names import Format
from squeeze.reports.parts import Text
from squeeze.reports.report import Certificate
from tests.models.rounding import dequantized, rounded
from tests.models.tiny import llama

DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Written:
    """A model in both formats, with what its dequantized weights say of some windows."""

    directories: dict[str, Path]
    source_bytes: int
    windows: Windows
    expected: list[float]

    def certify(self, name: Format, directory: Path | None = None, **changes: Any) -> list[Certificate]:
        arguments: dict[str, Any] = {
            "expected": self.expected,
            "windows": self.windows,
            "source_bytes": self.source_bytes,
            "dtype": torch.float32,
            "device": "cpu",
            "consumers": {},
            "notify": Silent(),
        }
        return certify(directory or self.directories[name], name, **(arguments | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("certify")
    model = llama(root / "model")
    source, quantized = rounded(model, root / "codes", bits=4, symmetric=False)
    formats: tuple[Format, ...] = ("compressed-tensors", "gptq")
    for name in formats:
        layout(name).write(source, quantized, root / name, Silent())
    ids = torch.randint(0, 512, (3, 96), generator=torch.Generator().manual_seed(0))
    first_scored = (1, 64, 64)
    text = Text(origin="dice", generic=True, sequences=3, sequence_length=96, tokens=288, sha256="")
    plain = dequantized(model, quantized, torch.float32).eval()
    expected = []
    for row, first in zip(ids, first_scored, strict=True):
        with torch.no_grad():
            logits = plain(row[None]).logits[0]
        expected.append(float(torch.nn.functional.cross_entropy(logits[first - 1 : -1], row[first:])))
    directories = {name: root / name for name in formats}
    return Written(directories, source.weight_bytes, Windows(ids, first_scored, 32, text), expected)


def edited(directory: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a written directory with other tensors."""
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if result := found():
            return result
        threading.Event().wait(0.005)
    raise AssertionError("it did not come")


def certifiers_of(parent: int) -> list[int]:
    """Process ids of the certifying programs whose parent is `parent`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "status").read_text()
            program = (entry / "cmdline").read_bytes()
        except OSError:  # it ended while we looked
            continue
        if f"\nPPid:\t{parent}\n" in status and b"models.certifying.in_transformers" in program:
            found.append(int(entry.name))
    return found


def test_transformers_sees_the_perplexity_that_was_measured_and_vllm_is_not_checked_where_there_is_none(
    written: Written,
) -> None:
    transformers, vllm = written.certify("compressed-tensors")

    assert (transformers.outcome, transformers.tolerance) == ("passed", 0.001)
    assert transformers.perplexity == pytest.approx(transformers.expected_perplexity, rel=1e-5)
    assert transformers.version
    assert transformers.sample
    assert transformers.peak_host_bytes is not None
    assert transformers.peak_host_bytes > 100_000_000
    assert (vllm.consumer, vllm.outcome) == ("vllm", "not checked")


def test_gptq_passes_within_the_noise_of_its_kernels(written: Written) -> None:
    certificate = written.certify("gptq")[0]

    assert certificate.outcome == "passed"
    assert certificate.tolerance == pytest.approx(0.01 + 0.2 / (95 + 32 + 32) ** 0.5)
    assert certificate.perplexity == pytest.approx(certificate.expected_perplexity, rel=0.01)


def test_a_model_larger_than_the_memory_allowed_is_loaded_with_its_weights_on_disk(written: Written) -> None:
    certificate = written.certify("compressed-tensors", memory_limit_bytes=1)[0]

    assert certificate.outcome == "passed"
    assert "weights on disk" in certificate.detail
    assert certificate.perplexity == pytest.approx(certificate.expected_perplexity, rel=1e-5)


def test_a_wrong_scale_fails_with_both_perplexities(written: Written, tmp_path: Path) -> None:
    def double_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 1.5

    broken = edited(written.directories["compressed-tensors"], tmp_path / "broken", double_one)

    with pytest.raises(CertificationFailed, match=r"perplexity [\d.]+ on 3 windows, .*more than the 0\.1%"):
        written.certify("compressed-tensors", broken)


def test_a_directory_that_does_not_load_fails_with_the_consumers_words_and_no_path_of_the_machine(
    written: Written, tmp_path: Path
) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:64].clone()

    broken = edited(written.directories["compressed-tensors"], tmp_path / "broken", narrow)

    with pytest.raises(
        CertificationFailed, match="transformers on the compressed-tensors result: RuntimeError"
    ) as caught:
        written.certify("compressed-tensors", broken)

    assert str(tmp_path) not in caught.value.message


def test_a_result_that_is_no_smaller_than_its_source_fails_before_anything_is_loaded(written: Written) -> None:
    with pytest.raises(CertificationFailed, match="no fewer than the source's 1,000"):
        written.certify("gptq", source_bytes=1000)


def test_where_nothing_was_measured_the_directory_still_has_to_load_and_to_generate(written: Written) -> None:
    certificate = written.certify("compressed-tensors", expected=None, windows=None)[0]

    assert certificate.outcome == "passed"
    assert certificate.sample
    assert certificate.perplexity is None


def test_an_interpreter_without_vllm_is_reported_and_fails_nothing(written: Written) -> None:
    told: list[str] = []

    class Notes(Silent):
        def event(self, kind: str, message: str, **data: Any) -> None:
            told.append(message)

    vllm = written.certify("compressed-tensors", consumers={"vllm": Path(sys.executable)}, notify=Notes())[1]

    assert vllm.outcome == "failed"
    assert "no vllm" in vllm.detail
    assert len(told) == 1
    assert told[0].startswith("vllm did not certify compressed-tensors")


def test_the_process_gets_no_secrets_and_its_violent_end_is_one_that_a_retry_may_mend(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("SQUEEZE_DATABASE_URL", "postgresql://me:secret@host/db")
    seen: list[bytes] = []

    def kill() -> None:
        (process,) = until(lambda: certifiers_of(os.getpid()))
        seen.append(Path(f"/proc/{process}/environ").read_bytes())
        os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ProcessKilled, match="SIGKILL") as caught:
        written.certify("compressed-tensors")
    killer.join()

    assert caught.value.retryable
    assert b"HF_HUB_OFFLINE=1" in seen[0]
    assert b"hf_abc" not in seen[0]
    assert b"me:secret" not in seen[0]


@pytest.fixture
def orphan_maker(written: Written, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that certifies, and can be killed over it."""
    program = tmp_path / "certifies.py"
    directory = written.directories["compressed-tensors"]
    program.write_text(
        "import json, os, subprocess, sys\n"
        f"request = {json.dumps({'directory': str(directory), 'parent': 0})} | {{'parent': os.getpid()}}\n"
        f"open('{tmp_path}/request.json', 'w').write(json.dumps(request))\n"
        "subprocess.run([sys.executable, '-m', 'models.certifying.in_transformers', "
        f"'{tmp_path}/request.json', '{tmp_path}/answer.json'])\n"
    )
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, str(program)], env=os.environ | {"PYTHONPATH": str(root)})
    yield process
    process.kill()
    process.wait()


def test_the_process_dies_with_the_one_that_started_it(orphan_maker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (process,) = until(lambda: certifiers_of(orphan_maker.pid))

    orphan_maker.kill()
    orphan_maker.wait()

    until(lambda: not Path(f"/proc/{process}").exists())
    assert not (tmp_path / "answer.json").exists()


@pytest.mark.slow
@pytest.mark.skipif("SQUEEZE_VLLM_PYTHON" not in os.environ, reason="SQUEEZE_VLLM_PYTHON names no vLLM environment")
def test_vllm_sees_the_perplexity_that_was_measured(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", dtype=torch.bfloat16, num_attention_heads=2, num_key_value_heads=1)
    source, quantized = rounded(model, tmp_path / "codes", bits=4, group_size=128)
    ids = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0))
    text = Text(origin="dice", generic=True, sequences=2, sequence_length=128, tokens=256, sha256="")
    plain = dequantized(model, quantized, torch.bfloat16).eval()
    with torch.no_grad():
        logits = plain(ids).logits.float()
    expected = [float(torch.nn.functional.cross_entropy(a[:-1], b[1:])) for a, b in zip(logits, ids, strict=True)]
    formats: tuple[Format, ...] = ("compressed-tensors", "gptq")
    for name in formats:
        layout(name).write(source, quantized, tmp_path / name, Silent())

        certificates = certify(
            tmp_path / name,
            name,
            expected=expected,
            windows=Windows(ids, (1, 1), 128, text),
            source_bytes=source.weight_bytes,
            dtype=torch.bfloat16,
            device="cpu",
            consumers={"vllm": Path(os.environ["SQUEEZE_VLLM_PYTHON"])},
            notify=Silent(),
        )

        assert [one.outcome for one in certificates] == ["passed", "passed"], certificates
