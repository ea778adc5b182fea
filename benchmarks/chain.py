"""One job that prunes, distills and quantizes: perplexity after each of its steps, on the same held-out text.

    python benchmarks/chain.py [--model DIR] [--target 0.75] [--methods width depth] [--steps 150] [--text FILE]

The job runs as a worker runs it, with everything certified. Without a text it learns from the generic one. Prints
Markdown, and how much of what pruning lost (in nats a token) distilling won back.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.job import Inputs
from models.pipeline import run
from models.progress import Silent
from squeeze.reports.report import Report
from squeeze.specs.job_spec import JobSpec

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--target", type=float, default=0.75)
    parser.add_argument("--methods", nargs="+", default=["width", "depth"], choices=["width", "depth"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| pruned by | parameters | original | pruned | distilled | 4 bits | won back | weights, MB "
        "| prompt, times as fast | CPU seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in options.methods:
        began = time.process_time()
        _print(method, _job(options, method), time.process_time() - began)


def _job(options: Any, method: str) -> Report:
    training = {"steps": options.steps, "batch_size": options.batch, "learning_rate": options.rate}
    steps = [
        {"kind": "prune", "method": method, "params_target": options.target},
        {"kind": "distill", "method": "logits"} | training,
        {"kind": "quantize", "method": "gptq", "bits": 4},
    ]
    data: dict[str, Any] = {"sequence_length": options.length}
    if options.text is not None:
        data["source"] = "file-abcdefgh"
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        inputs = Inputs(
            spec=JobSpec.model_validate({"model": "org/model", "steps": steps, "data": data}),
            model=options.model.resolve(),
            model_name="model",
            work=room / "work",
            out=room / "out",
            device="cpu",
            job_id="job",
            calibration_text=options.text,
        )
        for place in (inputs.work, inputs.out):
            place.mkdir()
        return run(inputs, Silent()).report


def _print(method: str, report: Report, seconds: float) -> None:
    training, slimming = report.training, report.slimming
    assert training is not None and training.distillation is not None and slimming is not None, "the job has them"
    original, pruned, distilled = training.distillation.loss_teacher, training.loss_before, training.loss_after
    assert original is not None, "teacher and student have one tokenizer"
    (rounded,) = training.loss_quantized.values()
    faster = slimming.speed_after.prompt / slimming.speed_before.prompt
    figures = " | ".join(f"{math.exp(one):.2f}" for one in (original, pruned, distilled, rounded))
    won = (pruned - distilled) / (pruned - original)
    sizes = f"{report.source.bytes / 1e6:.2f} -> {report.sizes[0].weight_bytes / 1e6:.2f}"
    print(
        f"| {method} | {slimming.parameters_before:,} -> {slimming.parameters_after:,} | {figures} | {won:.0%} "
        f"| {sizes} | {faster:.2f} | {seconds:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
