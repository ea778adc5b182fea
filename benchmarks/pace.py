"""Processor seconds of each stage of a job against its counted work: `python benchmarks/pace.py [--methods gptq …]`.

Runs whole jobs on a random Llama, on one thread, and prints for each the seconds, the operations that
`squeeze.costs.work` counts, and the speed that follows: the figures of `squeeze.costs.pace`, which plans rest on where
a service has finished no job yet. Seconds are of the processor, the certifying processes' included, so that a busy
machine does not matter much; where it does, `--rounds 3` takes the methods in turn, and what counts is the last column:
how quick each is beside the first of them in the same round, the median of all rounds.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import training_memory
from benchmarks.memory import BUNDLED, inputs_of, make, spec_of
from models.pipeline import run
from models.progress import Silent
from models.resources import cpu_seconds
from squeeze.objects import Stage
from squeeze.steps.every import tag_of
from squeeze.steps.quantization import METHODS

# AutoRound's iterations and AWQ's grid are as they are by default, but for fewer of them: both grow linearly.
SETTINGS: dict[str, dict[str, Any]] = {"autoround": {"iterations": 10}, "awq": {"grid": 6}, "qat": {"steps": 5}}

# Of those that prune; text that `experts` and `vocabulary` need is not a random model's.
PRUNED: dict[str, dict[str, Any]] = {
    name: {"kind": "prune", "method": name, **more}
    for name, more in (
        ("magnitude", {}),
        ("wanda", {}),
        ("sparsegpt", {}),
        ("svd", {"params_target": 0.75}),
        ("depth", {"params_target": 0.75}),
        ("width", {"params_target": 0.75}),
    )
}

# Of those that train: adapters, the weights themselves, and students of one block. Sequences of 256 tokens.
TRAINED: dict[str, dict[str, Any]] = {
    name: {"method": name, "steps": 4, "batch_size": 8, "micro_batch_size": 2, **more}
    for name, more in (
        ("lora", {"merge": True}),
        ("full", {}),
        ("logits", {"student": {"layers": 1}}),
        ("hidden", {"student": {"layers": 1}}),
        ("sequence", {"student": {"layers": 1}, "new_tokens": 64}),
        ("on_policy", {"student": {"layers": 1}}),
    )
}
LENGTH = 256


def main() -> None:
    # A model that is bfloat16 already is not cast to it; a cast to float16 takes as long.
    methods = [name for one in METHODS if (name := tag_of(one).partition(".")[2]) != "bf16"]
    methods += [*PRUNED, *TRAINED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--width", type=int, default=768, help="of the model; 0: the bundled one")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="in each of them every method comes once")
    options = parser.parse_args()
    print("| method | stage | processor seconds | operations | a second | beside the first |")
    print("|---|---|---|---|---|---|")
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        model = BUNDLED
        if options.width:
            model = Path(folder) / "model"
            make(model, options.blocks, options.width)
        for number in range(options.rounds):
            first: dict[str, float] = {}
            for method in options.methods:
                room = Path(folder) / f"{method}-{number}"
                if method in TRAINED:
                    spec = training_memory.spec_of(LENGTH, TRAINED[method])
                    job = training_memory.inputs_of(spec, model, room, LENGTH)
                else:
                    step = PRUNED.get(method) or {"method": method, **SETTINGS.get(method, {})}
                    job = inputs_of(spec_of(step), model, room)
                for stage, (seconds, work) in measured(method, job).items():
                    speed = work / seconds
                    ratios[method, stage].append(speed / first.setdefault(stage, speed))
                    row = (method, stage, f"{seconds:.2f}", f"{work:.2e}", f"{speed:.1e}")
                    print(f"| {' | '.join(row)} | {median(ratios[method, stage]):.2f} |", flush=True)


def measured(method: str, inputs: Any) -> dict[str, tuple[float, float]]:
    """(processor seconds, operations) of each stage of one job; looking for ranks or shares counts as compressing."""
    torch.set_num_threads(1)
    clock = _Clock("teaching" if method in training_memory.DISTILLING else "compressing")
    outcome = run(inputs, clock)
    clock.stage(Stage.uploading)
    work = dict(outcome.report.spent.work)
    if "allotting" in work:
        work["compressing"] += work.pop("allotting")
    return {stage: (clock.seconds[stage], each) for stage, each in work.items()}


class _Clock(Silent):
    """Processor seconds by stage, as reports name them. calibrating: what they call that."""

    def __init__(self, calibrating: str) -> None:
        self._calibrating = calibrating
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = Stage.planning, cpu_seconds()

    def stage(self, stage: Stage) -> None:
        now = cpu_seconds()
        own = self._calibrating if self._stage == Stage.calibrating else self._stage.value
        self.seconds[own] += now - self._since
        self._stage, self._since = stage, now


if __name__ == "__main__":
    main()
