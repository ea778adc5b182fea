"""Proves that a written directory is what was measured: consumers load it in fresh processes and score the same tokens.

transformers must pass, or the job fails with what was seen. vLLM, in an environment of its own, is asked where the
operator has one; what it says is reported.
"""

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models.certifying.running import NEW_TOKENS, Ended, Sample, environment, judge, run_program
from models.files.checkpoint import read_config, tensor_entries
from models.files.disk import says_full
from models.formats.compressed_tensors_config import rounds_while_running
from models.formats.compressed_tensors_parts import weights_in
from models.formats.directory import weight_bytes
from models.formats.safetensors_zst import restored
from models.progress import Notify
from models.resources import available_host_bytes, peak_host_bytes
from models.texts.data import Windows
from squeeze.errors import CertificationFailed, DiskFull, ProcessKilled, SqueezeError
from squeeze.names import Format
from squeeze.reports.report import Certificate
from squeeze.specs.formats import CAPACITIES

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS_OFFLOADED = 4  # each reads the whole model from disk

# Where transformers computes what the engine does in float32, 0.000 % was measured.
TOLERANCE_EXACT = 0.001

# transformers computes these as it would the plain model, and can leave their weights on disk.
UNPACKED = frozenset({"compressed-tensors", "safetensors"})

# What a certifier may take in any case; a job that took less is not worth the detour over the disk.
LEAST_LIMIT_BYTES = 600_000_000
IDLE_BYTES = 450_000_000  # of a process that has imported torch, transformers and gptqmodel; measured
GPTQ_BYTES_PER_WEIGHT = 2.0  # with what gptqmodel's CPU kernels make of the codes; measured: 1.7 at 4 bits


@dataclass(frozen=True)
class Foreign:
    """A consumer with an environment of its own: its program, what it takes, and how the operator names its Python.

    own: it also stands in this process's environment, and the directory is worth nothing where it fails.
    """

    program: str
    variable: str
    seconds: float
    settings: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 0.0  # allowed relative difference beyond what other kernels explain
    own: bool = False


FOREIGN: dict[str, Foreign] = {
    "vllm": Foreign(
        "in_vllm.py",
        "SQUEEZE_VLLM_PYTHON",
        3600.0,
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which dies with this one
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window as long as the model's positions, and one token
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": "{scratch}",
        },
    ),
    "llama.cpp": Foreign("in_llamacpp.py", "SQUEEZE_LLAMACPP_PYTHON", 3600.0, tolerance=0.01),
    "onnxruntime": Foreign("in_onnxruntime.py", "SQUEEZE_ONNXRUNTIME_PYTHON", 3600.0, own=True),
}


def certify(
    directory: Path,
    format_name: Format,
    *,
    expected: list[float] | None = None,
    windows: Windows | None = None,
    sample: Sample | None = None,
    base: Path | None = None,
    base_settings: Mapping[str, Any] | None = None,
    source_bytes: int,
    dtype: torch.dtype,
    device: str,
    consumers: Mapping[str, Path],
    texts: Sequence[tuple[str, list[int]]] = (),
    notify: Notify,
    memory_limit_bytes: int | None = None,
) -> list[Certificate]:
    """One certificate a consumer; raises CertificationFailed where transformers does not see what the engine measured.

    expected: mean negative log-likelihood of each window's scored tokens as the engine measured it, nats; None where
    nothing was measured: then the directory only has to load and to generate.
    sample: what is scored, where that isn't windows. base: the model that an adapter goes with. base_settings: of
    bitsandbytes, where that is rounded while it is loaded.
    dtype: in which the engine computed. consumers: Pythons of the environments that the operator has for other
    consumers than transformers, by the consumer's name. texts: with the numbers of their tokens, for those that make
    their own. memory_limit_bytes: host memory that a certifying process may take; where the
    model needs more, its weights stay on disk. Default: what this job has taken so far, so that certifying never sets a
    job's peak.
    """
    if format_name == "safetensors-zst":
        with restored(directory) as plain:
            seen = certify(
                plain,
                "safetensors",
                expected=expected,
                windows=windows,
                sample=sample,
                source_bytes=source_bytes,
                dtype=dtype,
                device=device,
                consumers=consumers,
                texts=texts,
                notify=notify,
                memory_limit_bytes=memory_limit_bytes,
            )
        how = "unpacked by zstd; "
        return [one.model_copy(update={"format": format_name, "detail": how + one.detail}) for one in seen]
    size_bytes = weight_bytes(directory)
    # A cast to another 16-bit type saves nothing, and an adapter comes on top.
    if size_bytes >= source_bytes and format_name not in ("safetensors", "peft"):
        raise CertificationFailed(
            f"the {format_name} weights take {size_bytes:,} bytes, no fewer than the source's {source_bytes:,}: "
            "use fewer bits, larger groups or a smaller share of the parameters"
        )
    sample = sample or Sample.of(windows, expected)
    limit = memory_limit_bytes if memory_limit_bytes is not None else max(peak_host_bytes(), LEAST_LIMIT_BYTES)
    able = CAPACITIES[format_name].consumers
    asked = {"directory": str(directory), "dtype": str(dtype).removeprefix("torch."), "device": device, "texts": texts}
    certificates = []
    if "transformers" in able:
        certificates.append(_transformers(directory, format_name, sample, dtype, device, limit))
    if base is not None:
        certificates.append(_peft(directory, base, base_settings, sample, dtype, device))
    foreign = sample if sample.learned is None else Sample.of(None, None)  # they score whole windows
    for name, consumer in FOREIGN.items():
        if name in able and sample.labels:
            certificates.append(
                _unasked(format_name, name, f"{name} is asked about models that write, and this tells labels apart")
            )
        elif name in able:
            certificates.append(_foreign(directory, format_name, foreign, asked, name, consumer, consumers))
    for certificate in certificates:
        if certificate.outcome == "failed":
            notify.event(
                "warning",
                f"{certificate.consumer} did not certify {format_name}: {certificate.detail}",
                format=format_name,
            )
    return certificates


def loss_in_transformers(
    directory: Path, format_name: Format, sample: Sample, dtype: torch.dtype, device: str
) -> float | None:
    """Mean negative log-likelihood of a sample's scored tokens, nats, in a fresh process; None where it can't load."""
    if "transformers" not in CAPACITIES[format_name].consumers:
        return None
    limit = max(peak_host_bytes(), LEAST_LIMIT_BYTES)
    seen = _transformers(directory, format_name, replace(sample, expected=None), dtype, device, limit)
    return None if seen.perplexity is None else math.log(seen.perplexity)


def _transformers(
    directory: Path, format_name: Format, sample: Sample, dtype: torch.dtype, device: str, limit_bytes: int
) -> Certificate:
    config = read_config(directory)
    if format_name == "bitsandbytes" and "float16" in (config.get("dtype"), config.get("torch_dtype")):
        dtype = torch.float16  # asked for another type, transformers 5.23 leaves a part of the rest in this one
    need_bytes = _need_bytes(directory, format_name, dtype)
    quantization = config.get("quantization_config", {})
    # transformers 5.23 unpacks all layers by the first group's rule when it unpacks while it loads.
    movable = format_name in UNPACKED and len(quantization.get("config_groups", ())) <= 1
    offload = movable and need_bytes > limit_bytes
    if not offload and device == "cpu" and need_bytes > max(limit_bytes, available_host_bytes()):
        return _unasked(
            format_name,
            "transformers",
            f"transformers can't keep these {format_name} weights on disk, and in memory they would take some "
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
        command = [sys.executable, "-m", "models.certifying.in_transformers"]
        ended = run_program(command, request, Path(scratch), environment(scratch) | {"PYTHONPATH": str(ROOT)}, None)
    plain = format_name in UNPACKED and not rounds_while_running(quantization)
    exact = dtype == torch.float32 and plain and device == "cpu"
    certificate = judge(format_name, "transformers", sample, ended, TOLERANCE_EXACT if exact else sample.tolerance)
    if certificate.outcome == "failed":
        raise _failure(certificate, ended)
    how = " with its weights on disk" if offload else ""
    kind = "AutoModelForSequenceClassification" if sample.labels else "AutoModelForCausalLM"
    alike = "; a batch that is filled up gives the same labels" if ended.answer.get("batched") else ""
    return certificate.model_copy(update={"detail": f"loaded by {kind}{how}; {certificate.detail}{alike}"})


def _peft(
    directory: Path,
    base: Path,
    base_settings: Mapping[str, Any] | None,
    sample: Sample,
    dtype: torch.dtype,
    device: str,
) -> Certificate:
    """Of an adapter, on the model that it goes with."""
    with tempfile.TemporaryDirectory(prefix=".certify-", dir=directory.parent) as scratch:
        request = sample.request() | {
            "directory": str(directory),
            "base": str(base),
            "base_settings": base_settings,
            "format": "peft",
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "offload": False,
            "new_tokens": NEW_TOKENS,
        }
        command = [sys.executable, "-m", "models.certifying.in_transformers"]
        ended = run_program(command, request, Path(scratch), environment(scratch) | {"PYTHONPATH": str(ROOT)}, None)
    coded = "quantization_config" in read_config(base)
    exact = dtype == torch.float32 and device == "cpu" and base_settings is None and not coded
    certificate = judge("peft", "peft", sample, ended, TOLERANCE_EXACT if exact else sample.tolerance)
    if certificate.outcome == "failed":
        raise _failure(certificate, ended)
    rounded = ", as gptq holds it" if coded else ""
    if base_settings is not None:
        rounded = ", rounded by bitsandbytes as it was then"
    detail = f"loaded by PeftModel on the model that it was trained on{rounded}; {certificate.detail}"
    return certificate.model_copy(update={"detail": detail})


def _failure(certificate: Certificate, ended: Ended) -> SqueezeError:
    """What a job ends with where a consumer that it must satisfy fails."""
    name = certificate.format
    if ended.killed:
        return ProcessKilled(
            f"the process that loads the {name} result was killed ({ended.killed}), most likely for want of "
            "memory; retry on a machine with more"
        )
    if says_full(certificate.detail):
        return DiskFull(f"the disk filled up while the {name} result was certified; free space and retry the job")
    return CertificationFailed(f"{certificate.consumer} on the {name} result: {certificate.detail}")


def _foreign(
    directory: Path,
    format_name: Format,
    sample: Sample,
    asked: Mapping[str, Any],
    name: str,
    consumer: Foreign,
    consumers: Mapping[str, Path],
) -> Certificate:
    python = consumers.get(name) or (Path(sys.executable) if consumer.own else None)
    if python is None:
        return _unasked(format_name, name, f"no environment with {name} is set ({consumer.variable})")
    with tempfile.TemporaryDirectory(prefix=".certify-", dir=directory.parent) as scratch:
        request = sample.request() | dict(asked) | {"new_tokens": NEW_TOKENS}
        settings = {key: value.format(scratch=scratch) for key, value in consumer.settings.items()}
        command = [str(python), str(Path(__file__).with_name(consumer.program))]
        ended = run_program(command, request, Path(scratch), environment(scratch) | settings, consumer.seconds)
    certificate = judge(format_name, name, sample, ended, sample.tolerance + consumer.tolerance)
    if certificate.outcome == "failed" and consumer.own:
        raise _failure(certificate, ended)
    return certificate


def _unasked(format_name: Format, consumer: str, why: str) -> Certificate:
    return Certificate(format=format_name, consumer=consumer, version=None, outcome="not checked", detail=why)


def _need_bytes(directory: Path, format_name: Format, dtype: torch.dtype) -> int:
    """Host memory that transformers takes with all weights in memory; mapped files count."""
    quantization = read_config(directory).get("quantization_config", {})
    bits, packed_name, each = 32, "", 0.0
    if format_name in ("gptq", "awq"):
        bits, packed_name, each = quantization["bits"], ".qweight", GPTQ_BYTES_PER_WEIGHT
    other_bytes = packed_weights = 0
    entries = tensor_entries(directory)
    for name, entry in entries.items():
        count = torch.Size(entry.shape).numel()
        weights = weights_in(name, entries) if format_name == "compressed-tensors" else None
        if weights is not None:
            other_bytes += weights * dtype.itemsize
        elif packed_name and name.endswith(packed_name):
            packed_weights += count * 32 // bits
        else:
            other_bytes += count * (dtype.itemsize if entry.dtype.is_floating_point else entry.dtype.itemsize)
    return IDLE_BYTES + weight_bytes(directory) + other_bytes + int(packed_weights * each)


def _free_device_bytes(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0] * 0.8)
