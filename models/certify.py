"""Proves that a written directory is what was measured: consumers load it in fresh processes and score the same tokens.

transformers must pass, or the job fails with what was seen. vLLM, in an environment of its own, is asked where the
operator has one; what it says is reported.
"""

import json
import math
import os
import re
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import read_config, tensor_entries
from models.data import Windows
from models.disk import says_full
from models.formats.directory import weight_bytes
from models.progress import Notify
from models.quoting import quoted
from models.resources import available_host_bytes, peak_host_bytes
from squeeze.errors import CertificationFailed, DiskFull, ProcessKilled
from squeeze.report import Certificate
from squeeze.steps import Format

ROOT = Path(__file__).resolve().parents[1]
VLLM_PROGRAM = Path(__file__).with_name("certify_vllm.py")
VLLM_SECONDS = 3600.0

# Enough tokens to tell a wrong weight from the noise of another kernel; more would only take longer.
MAX_WINDOWS = 16
MAX_TOKENS = 8192
PROMPT_TOKENS = 16
NEW_TOKENS = 24
NEW_TOKENS_OFFLOADED = 4  # each reads the whole model from disk

# Allowed relative difference of the perplexities. Where transformers computes what the engine does in float32, 0.000 %
# was measured. 16-bit sums in another order, and gptqmodel's CPU kernels, which round to bfloat16 whatever the model's
# own type, gave 0.00 to 0.07 % on trained models and 0.8 % on 508 tokens of a random one of 64 blocks: noise of some
# 0.2 nats a token at worst, which averages out.
TOLERANCE_EXACT = 0.001
TOLERANCE = 0.01
NOISE_NATS = 0.2  # over the root of the number of tokens, on top of TOLERANCE

# What a certifier may take in any case; a job that took less is not worth the detour over the disk.
LEAST_LIMIT_BYTES = 600_000_000
IDLE_BYTES = 450_000_000  # of a process that has imported torch, transformers and gptqmodel; measured
GPTQ_BYTES_PER_WEIGHT = 2.0  # with what gptqmodel's CPU kernels make of the codes; measured: 1.7 at 4 bits

# All of the environment that the consumers see: what finds programs and devices, and no secret.
PASSED_ON = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|LD_PRELOAD|OMP_NUM_THREADS|MKL_NUM_THREADS|PYTHONDONTWRITEBYTECODE|VIRTUAL_ENV"
    r"|CUDA_\w+|NVIDIA_\w+"
)


def certify(
    directory: Path,
    format_name: Format,
    *,
    expected: list[float] | None,
    windows: Windows | None,
    source_bytes: int,
    dtype: torch.dtype,
    device: str,
    vllm_python: Path | None,
    notify: Notify,
    memory_limit_bytes: int | None = None,
) -> list[Certificate]:
    """One certificate a consumer; raises CertificationFailed where transformers does not see what the engine measured.

    expected: mean negative log-likelihood of each window's scored tokens as the engine measured it, nats; None where
    nothing was measured: then the directory only has to load and to generate.
    dtype: in which the engine computed. memory_limit_bytes: host memory that a certifying process may take; where the
    model needs more, its weights stay on disk. Default: what this job has taken so far, so that certifying never sets a
    job's peak.
    """
    size_bytes = weight_bytes(directory)
    if size_bytes >= source_bytes:
        raise CertificationFailed(
            f"the {format_name} weights take {size_bytes:,} bytes, no fewer than the source's {source_bytes:,}: "
            "use fewer bits or larger groups"
        )
    sample = _Sample.of(windows, expected)
    limit = memory_limit_bytes if memory_limit_bytes is not None else max(peak_host_bytes(), LEAST_LIMIT_BYTES)
    certificates = [_transformers(directory, format_name, sample, dtype, device, limit)]
    certificates.append(_vllm(directory, format_name, sample, dtype, device, vllm_python))
    for certificate in certificates:
        if certificate.outcome == "failed":
            notify.event(
                "warning",
                f"{certificate.consumer} did not certify {format_name}: {certificate.detail}",
                format=format_name,
            )
    return certificates


@dataclass(frozen=True)
class _Sample:
    """The windows that certifiers score, with what the engine says of them."""

    ids: list[list[int]]
    first_scored: list[int]
    expected: list[float] | None

    @classmethod
    def of(cls, windows: Windows | None, expected: list[float] | None) -> "_Sample":
        if windows is None or expected is None:
            return cls([], [], None)
        count = max(1, min(MAX_WINDOWS, MAX_TOKENS // windows.ids.shape[1]))
        return cls(windows.ids[:count].tolist(), list(windows.first_scored[:count]), expected[:count])

    @property
    def counts(self) -> list[int]:
        """Scored tokens of each window."""
        return [len(ids) - first for ids, first in zip(self.ids, self.first_scored, strict=True)]

    @property
    def tolerance(self) -> float:
        """Allowed relative difference where the kernels differ."""
        return TOLERANCE + NOISE_NATS / math.sqrt(max(sum(self.counts), 1))

    def perplexity(self, nll: list[float]) -> float:
        """Over the scored tokens of all windows, each of which has a mean."""
        mean = sum(count * each for count, each in zip(self.counts, nll, strict=True)) / sum(self.counts)
        return math.exp(min(mean, 700.0))

    def request(self) -> dict[str, Any]:
        return {
            "parent": os.getpid(),
            "ids": self.ids,
            "first_scored": self.first_scored,
            "prompt_tokens": PROMPT_TOKENS,
        }


def _transformers(
    directory: Path, format_name: Format, sample: _Sample, dtype: torch.dtype, device: str, limit_bytes: int
) -> Certificate:
    need_bytes = _need_bytes(directory, format_name, dtype)
    offload = format_name == "compressed-tensors" and need_bytes > limit_bytes
    if not offload and device == "cpu" and need_bytes > max(limit_bytes, available_host_bytes()):
        return Certificate(
            format=format_name,
            consumer="transformers",
            version=None,
            outcome="not checked",
            detail=f"transformers can't keep {format_name} weights on disk, and in memory they would take some "
            f"{need_bytes / 1e9:.1f} GB, more than this machine has free",
        )
    with tempfile.TemporaryDirectory(prefix=".certify-", dir=directory.parent) as scratch:
        request = sample.request() | {
            "directory": str(directory),
            "format": format_name,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "offload": offload,
            "device_weight_bytes": _free_device_bytes(device),
            "scratch": scratch,
            "new_tokens": NEW_TOKENS_OFFLOADED if offload else NEW_TOKENS,
        }
        command = [sys.executable, "-m", "models.certify_process"]
        ended = _run(command, request, Path(scratch), _environment(scratch) | {"PYTHONPATH": str(ROOT)}, None)
    exact = dtype == torch.float32 and format_name == "compressed-tensors" and device == "cpu"
    certificate = _judge(format_name, "transformers", sample, ended, TOLERANCE_EXACT if exact else sample.tolerance)
    if certificate.outcome == "failed":
        if ended.killed:
            raise ProcessKilled(
                f"the process that loads the {format_name} result was killed ({ended.killed}), most likely for want of "
                "memory; retry on a machine with more"
            )
        if says_full(certificate.detail):
            raise DiskFull(
                f"the disk filled up while the {format_name} result was certified; free space and retry the job"
            )
        raise CertificationFailed(f"transformers on the {format_name} result: {certificate.detail}")
    how = " with its weights on disk" if offload else ""
    return certificate.model_copy(update={"detail": f"loaded by AutoModelForCausalLM{how}; {certificate.detail}"})


def _vllm(
    directory: Path, format_name: Format, sample: _Sample, dtype: torch.dtype, device: str, python: Path | None
) -> Certificate:
    if python is None:
        return Certificate(
            format=format_name,
            consumer="vllm",
            version=None,
            outcome="not checked",
            detail="no vLLM environment is set (SQUEEZE_VLLM_PYTHON)",
        )
    with tempfile.TemporaryDirectory(prefix=".certify-", dir=directory.parent) as scratch:
        request = sample.request() | {
            "directory": str(directory),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "new_tokens": NEW_TOKENS,
        }
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which dies with this one
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window as long as the model's positions, and one token
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": scratch,
        }
        ended = _run(
            [str(python), str(VLLM_PROGRAM)], request, Path(scratch), _environment(scratch) | settings, VLLM_SECONDS
        )
    return _judge(format_name, "vllm", sample, ended, sample.tolerance)


@dataclass(frozen=True)
class _Ended:
    """How a certifying process ended. answer: what it wrote, empty when it did not come so far. killed: by a signal."""

    answer: Mapping[str, Any]
    last_words: str
    killed: str | None


def _run(
    command: list[str], request: Mapping[str, Any], scratch: Path, environment: Mapping[str, str], seconds: float | None
) -> _Ended:
    """Runs a certifying program in the foreground; its noise goes to a file, of which only the last words are kept."""
    asked, answered, noise = scratch / "request.json", scratch / "answer.json", scratch / "noise.txt"
    asked.write_text(json.dumps(request), encoding="utf-8")
    killed = None
    with noise.open("wb") as log:
        try:
            status = subprocess.run(
                [*command, str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=scratch,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status, killed = 0, f"no answer within {seconds:.0f} s"
    if status < 0:
        killed = signal.Signals(-status).name
    answer = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else {}
    return _Ended(answer, _last_words(noise), killed)


def _judge(format_name: Format, consumer: str, sample: _Sample, ended: _Ended, tolerance: float) -> Certificate:
    """What an answer says: loaded and generated, and where there is something to compare with, the same perplexity."""
    answer = ended.answer
    perplexity = expected = None
    outcome, detail = "passed", "generated; no perplexity was measured to compare with"
    if "error" in answer or "nll" not in answer:
        outcome, detail = "failed", quoted(answer.get("error") or ended.killed or ended.last_words)
    elif sample.expected is not None:
        perplexity, expected = sample.perplexity(answer["nll"]), sample.perplexity(sample.expected)
        apart = abs(perplexity / expected - 1)
        within = apart <= tolerance
        outcome = "passed" if within else "failed"
        detail = (
            f"perplexity {perplexity:.6g} on {len(sample.ids)} windows, {apart:.3%} from the {expected:.6g} measured "
            f"while compressing; {'within' if within else 'more than'} the {tolerance:.1%} that other kernels explain"
        )
    return Certificate.model_validate(
        {
            "format": format_name,
            "consumer": consumer,
            "version": answer.get("version"),
            "outcome": outcome,
            "detail": detail,
            "perplexity": perplexity,
            "expected_perplexity": expected,
            "tolerance": tolerance if expected is not None else None,
            "sample": answer.get("sample"),
            "seconds": answer.get("seconds"),
            "peak_host_bytes": answer.get("peak_host_bytes"),
        }
    )


def _need_bytes(directory: Path, format_name: Format, dtype: torch.dtype) -> int:
    """Host memory that transformers takes with all weights in memory; mapped files count."""
    quantization = read_config(directory)["quantization_config"]
    if format_name == "gptq":
        bits, packed_name, each = quantization["bits"], ".qweight", GPTQ_BYTES_PER_WEIGHT
    else:
        bits = quantization["config_groups"]["group_0"]["weights"]["num_bits"]
        packed_name, each = ".weight_packed", float(dtype.itemsize)
    other_bytes = packed_weights = 0
    for name, entry in tensor_entries(directory).items():
        count = torch.Size(entry.shape).numel()
        if name.endswith(packed_name):
            packed_weights += count * 32 // bits
        else:
            other_bytes += count * dtype.itemsize
    return IDLE_BYTES + weight_bytes(directory) + other_bytes + int(packed_weights * each)


def _free_device_bytes(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0] * 0.8)


def _environment(scratch: str) -> dict[str, str]:
    """Offline, quiet, with all caches in the scratch directory, and without this process's secrets."""
    kept = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    return kept | {
        "HOME": scratch,
        "PYTHONUSERBASE": site.getuserbase(),  # which HOME would move
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": scratch,
        "XDG_CACHE_HOME": scratch,
        "TMPDIR": scratch,
        "TORCHINDUCTOR_CACHE_DIR": scratch,
        "TORCHDYNAMO_DISABLE": "1",  # gptqmodel compiles its layers, which takes a C++ compiler and half a minute
        "TOKENIZERS_PARALLELISM": "false",
        # glibc would keep freed tensors in its arenas: at 24 blocks of width 1024 the peak was 1.9 GB, with these 0.95.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }


def _last_words(noise: Path) -> str:
    """The last line of a process that left no answer: with Python, the exception."""
    lines = [
        line.strip() for line in noise.read_bytes()[-16_384:].decode(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1] if lines else "the process ended without a word"
