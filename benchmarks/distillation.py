"""A student of half the teacher's depth: what logits teach it, and what cross-entropy alone does on the same tokens.

    python benchmarks/distillation.py [--model DIR] [--layers 2] [--steps 30] [--rates 0.001] [--seeds 0 1 2]

Every run sees the same student, the same text in the same order for a seed, the same held-out text, the same settings.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.distill.lesson import Lesson
from models.job import Inputs
from models.progress import Silent
from models.train.checkpoints import Checkpoints
from models.train.loop import train
from models.train.prepare import begun, prepare
from models.train.task import accelerator_of
from squeeze.reports.training import Distillation
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
BATCH = 8
ARMS: dict[str, dict[str, Any]] = {
    "cross-entropy alone": {"alpha": 0.0, "top_k": 1},
    "logits": {},
    "logits, alpha 1": {"alpha": 1.0},
    "logits, temperature 2": {"temperature": 2.0},
    "logits, top_k all": {"top_k": "all"},
    "logits, top_k 16": {"top_k": 16},
    "reverse_kl": {"objective": "reverse_kl"},
    "jsd": {"objective": "jsd"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["cross-entropy alone", "logits"], choices=ARMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [(arm, rate) for rate in options.rates for arm in options.arms]
    runs: dict[tuple[str, float], list[tuple[float, Distillation, float]]] = {kind: [] for kind in kinds}
    for seed in options.seeds:
        for arm, rate in kinds:
            runs[arm, rate].append(one(options, arm, rate, seed))
            loss, _, seconds = runs[arm, rate][-1]
            print(f"seed {seed}, {arm}, {rate:g}: {loss:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
    show(options, runs)


def show(options: Any, runs: dict[tuple[str, float], list[tuple[float, Distillation, float]]]) -> None:
    print(f"{options.layers} blocks, {options.steps} steps of {BATCH} × {options.length} tokens.\n")
    print("| what falls | rate | held-out loss by seed | median | KL to the teacher, median | seconds a run |")
    print("|---|---|---|---|---|---|")
    for (arm, rate), some in runs.items():
        losses, told, seconds = zip(*some, strict=True)
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        far = statistics.median(one.divergence_after or 0.0 for one in told)
        print(
            f"| {arm} | {rate:g} | {each} | {statistics.median(losses):.4f} | {far:.4f} "
            f"| {statistics.mean(seconds):.0f} |"
        )
    print(f"\nTeacher {told[0].loss_teacher:.4f}; {told[0].student_parameters:,} of {told[0].teacher_parameters:,}.")


def one(options: Any, arm: str, rate: float, seed: int) -> tuple[float, Distillation, float]:
    """(held-out loss, how far from the teacher, seconds with what the teacher took)."""
    step = {"kind": "distill", "method": "logits", "student": {"layers": options.layers}, "steps": options.steps}
    step |= {"learning_rate": rate, "batch_size": BATCH} | ARMS[arm]
    described = {"model": "org/model", "steps": [step], "seed": seed, "evaluation": {"samples": 48}}
    spec = JobSpec.model_validate(described | {"data": {"sequence_length": options.length}})
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        inputs = Inputs(
            spec=spec,
            model=options.model.resolve(),
            model_name="model",
            revision="0",
            work=Path(room),
            out=Path(room) / "out",
            device="cpu",
            job_id="job",
        )
        distill = spec.steps[0]
        assert isinstance(distill, Distill)
        prepared = prepare(inputs, distill)
        accelerator = accelerator_of(prepared.precision, prepared.device)
        lesson = Lesson(prepared, inputs, Silent())
        task = lesson.given(begun(prepared)[0])
        before = lesson.apart(task, accelerator)
        train(task, accelerator, Checkpoints(Path(room) / "train", prepared.mark), Silent(), 1e9)
        sums, counts = task.held_out_losses(accelerator)
        told = lesson.told(before, lesson.apart(task, accelerator))
    return float(sums.sum() / counts.sum()), told, time.monotonic() - began


if __name__ == "__main__":
    main()
