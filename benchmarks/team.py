"""One quantization by several processes, started by torchrun: seconds a block, peak memory, digest of the codes.

    torchrun --standalone --nproc-per-node 2 benchmarks/team.py --directory /tmp/team-2 [--device cuda]
    python benchmarks/team.py --directory /tmp/team-1 [--device cuda]

The second one is a process alone; both print the same digest where each process has as many threads. Writes random
weights of a Llama's shape and quantizes them; there are no evaluation windows.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarks.wide import make  # noqa: E402
from models.files.checkpoint import open_model  # noqa: E402
from models.progress import Silent  # noqa: E402
from models.streaming.team import Team  # noqa: E402
from models.streaming.teamwork import follow, frames_of, lead  # noqa: E402
from models.texts.data import calibration_batches  # noqa: E402
from models.weights.quantized import block_files  # noqa: E402
from squeeze.steps.every import Step  # noqa: E402
from squeeze.steps.quantization import Quantize  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for model and codes; emptied first")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--step", type=json.loads, default={"method": "gptq", "bits": 4}, help="as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step: Quantize = TypeAdapter(Step).validate_python({"kind": "quantize"} | options.step)
    team = Team.of_environment(options.device)
    if team.leads:
        measure(options, team, step)
    else:
        follow(team, step)


def measure(options: Any, team: Team, step: Quantize) -> None:
    shutil.rmtree(options.directory, ignore_errors=True)
    model = options.directory / "model"
    make(model, options.width, options.blocks)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = calibration_batches(tokenizer, None, None, options.samples, options.length, seed=0).ids
    frames = frames_of(open_model(model), step, torch.device(options.device))
    began = time.monotonic()
    work = options.directory / "work"
    done = lead(team, frames, step, ids if step.reads_inputs else None, None, work, "", Silent())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in block_files(work))).hexdigest()
    figures = {
        "processes": team.size,
        "seconds": round(time.monotonic() - began, 2),
        "seconds_by_block": [round(block.seconds, 2) for block in done.blocks],
        "peak_host_bytes": max(block.peak_host_bytes for block in done.blocks),
        "peak_gpu_bytes": max(block.peak_gpu_bytes for block in done.blocks),
        "digest": digest[:16],
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
