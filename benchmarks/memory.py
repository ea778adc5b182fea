"""Peak host memory of a whole job against the number of blocks: `python benchmarks/memory.py [--blocks 8 64]`.

Makes random Llamas of one width, runs the whole pipeline on each (every calibrated method, evaluation, writing,
certification) in a process of its own, and prints the largest resident size of that process, of the process that loads
the result in transformers, and of all at one moment, the first and the last with what a plan says of them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from squeeze.costs.memory import needed
from squeeze.costs.slimming_work import slimming_bytes, slimming_memory
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.slimming import Slim

# Every method that looks at text block by block. AutoRound's iterations are few: more take no more memory.
STEPS = (
    {"method": "gptq", "bits": 4},
    {"method": "gptq", "bits": 4, "asymmetric_calibration": True},
    {"method": "gptq", "bits": "auto", "target_bits": 3.5},
    {"method": "awq", "bits": 4},
    {"method": "autoround", "bits": 4, "iterations": 10},
    {"method": "smoothquant"},
    {"method": "fp8", "activations": "static"},
    {"method": "kquant"},
)
# Of those that prune; all but magnitude look at text.
PRUNING: tuple[dict[str, Any], ...] = (
    {"kind": "prune", "method": "magnitude"},
    {"kind": "prune", "method": "wanda"},
    {"kind": "prune", "method": "wanda", "distribution": "owl"},
    {"kind": "prune", "method": "sparsegpt"},
    {"kind": "prune", "method": "sparsegpt", "distribution": "owl"},
    {"kind": "prune", "method": "depth", "params_target": 0.75},
    {"kind": "prune", "method": "depth", "params_target": 0.75, "importance": "perplexity"},
    {"kind": "prune", "method": "width", "params_target": 0.75},
    {"kind": "prune", "method": "svd", "params_target": 0.75},
)
BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"


def make(directory: Path, blocks: int, width: int, vocabulary: int = 4096, positions: int = 512) -> None:
    """A random bfloat16 Llama with the bundled model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, directory)


def work(model: Path, step: dict[str, Any]) -> None:
    """The whole pipeline, in this process."""
    import torch

    from models.pipeline import run
    from models.progress import Silent

    torch.set_num_threads(1)
    run(inputs_of(spec_of(step), model, model.parent), Silent())


def spec_of(step: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate(
        {
            "model": "bench/random",
            "steps": [{"kind": "quantize"} | step],
            "data": {"samples": 16, "sequence_length": 256},
            "evaluation": {"samples": 8},
        }
    )


def inputs_of(spec: JobSpec, model: Path, folder: Path) -> Any:
    """Of a job that works in a folder, on the CPU."""
    from models.pipeline import Inputs

    return Inputs(
        spec=spec,
        model=model,
        model_name="bench/random",
        work=folder / "work",
        out=folder / "out",
        device="cpu",
        job_id="job-benchmark",
    )


def foretold(model: Path, step: dict[str, Any]) -> tuple[int, int]:
    """What a plan says of it: (of the job's process, of all at one moment), bytes."""
    from models.files.checkpoint import open_model

    spec, source = spec_of(step), open_model(model)
    shape, asked = source.shape(), spec.steps[0]
    if isinstance(asked, Slim):
        sizes = dict.fromkeys(spec.formats, shape.stored_bytes * shape.elements)
        return slimming_bytes(shape, spec, asked)[0], slimming_memory(shape, spec, asked, shape, sizes)[0]
    assert isinstance(asked, Compress), "the others have benchmarks of their own"
    stored = asked.scheme().bits_per_weight(shape.hidden) / 8
    size_bytes = int(shape.stored_bytes * (shape.elements - shape.weights) + stored * shape.weights)
    memory = needed(shape, spec, dict.fromkeys(spec.formats, size_bytes))
    return memory.job, memory.whole


class Watched(NamedTuple):
    """Of a command and its children. own, children: largest process; together: all at one moment. Bytes."""

    own: int
    children: int
    together: int
    seconds: float


def watch(command: list[str]) -> Watched:
    """Runs a command in a session of its own."""
    began = time.monotonic()
    job = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = children = together = 0
    while job.poll() is None:
        sizes = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                # Of its session; for a moment a new process looks like a second one of the size of its parent.
                if int(fields[3]) == job.pid and (process.name == str(job.pid) or _begun(process, job.pid)):
                    status = (process / "status").read_text()
                    sizes.append(_kib(status, "VmRSS"))
                    if process.name == str(job.pid):
                        own = max(own, _kib(status, "VmHWM"))
                    else:
                        children = max(children, _kib(status, "VmHWM"))
            except (FileNotFoundError, ProcessLookupError):
                continue
        together = max(together, sum(sizes))
        time.sleep(0.05)
    if job.returncode:
        raise SystemExit(f"the job ended with status {job.returncode}")
    return Watched(own * 1024, children * 1024, together * 1024, time.monotonic() - began)


def _begun(process: Path, parent: int) -> bool:
    """Whether it runs its own program by now."""
    return (process / "cmdline").read_bytes() != Path(f"/proc/{parent}/cmdline").read_bytes()


def _kib(status: str, field: str) -> int:
    line = next((line for line in status.splitlines() if line.startswith(f"{field}:")), None)
    return int(line.split()[1]) if line else 0  # a process that has just ended has none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=json.loads, nargs="+", help="steps as JSON")
    parser.add_argument("--pruning", action="store_true", help="the steps that prune, not those that quantize")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.steps[0])
        return
    print("| step | blocks | weights, MB | job, MB | planned | certifier, MB | all, MB | planned | seconds | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for step in options.steps or (PRUNING if options.pruning else STEPS):
        name = ", ".join(
            str(value) if key == "method" else f"{key} {value}" for key, value in step.items() if key != "kind"
        )
        first = None
        for blocks in options.blocks:
            with tempfile.TemporaryDirectory() as folder:
                model = Path(folder) / "model"
                make(model, blocks, options.width)
                weights = (model / "model.safetensors").stat().st_size
                planned = foretold(model, step)
                command = [sys.executable, __file__, "--work", str(model), "--steps", json.dumps(step)]
                seen = watch(command)
            first = first or seen
            print(
                f"| {name} | {blocks} | {weights / 1e6:.0f} | {seen.own / 1e6:.0f} | {planned[0] / 1e6:.0f} "
                f"| {seen.children / 1e6:.0f} | {seen.together / 1e6:.0f} | {planned[1] / 1e6:.0f} "
                f"| {seen.seconds:.0f} | {seen.own / first.own:.3f}, {seen.together / first.together:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
