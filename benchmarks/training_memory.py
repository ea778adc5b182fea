"""Peak host memory of a training against what a plan says of it: `python benchmarks/training_memory.py [--cases 0 …]`.

Makes random Llamas, trains each for two steps in a process of its own (examples, training, evaluation, writing,
certification), and prints the largest resident size of the job's process and the largest sum over all of its processes
at one moment, each with what a plan says of it.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import BUNDLED, make, watch
from squeeze.specs import JobSpec
from squeeze.trainable import learned
from squeeze.training_memory import TrainingMemory, needed_to_train

# (width, blocks, vocabulary), of which width 0 is the bundled model; tokens of a sequence; the step.
CASES: tuple[tuple[tuple[int, int, int], int, dict[str, Any]], ...] = (
    ((0, 5, 4096), 256, {"micro_batch_size": 4}),
    ((0, 5, 4096), 512, {"batch_size": 16}),
    ((512, 4, 4096), 512, {"micro_batch_size": 1}),
    ((512, 4, 4096), 512, {"micro_batch_size": 4}),
    ((512, 8, 4096), 1024, {"micro_batch_size": 2}),
    ((512, 4, 32000), 512, {"micro_batch_size": 2}),
    ((1024, 4, 4096), 512, {"micro_batch_size": 2}),
    ((1024, 4, 32000), 256, {"micro_batch_size": 1}),
    ((1024, 8, 32000), 512, {"micro_batch_size": 1, "activation_checkpointing": True}),
    ((512, 4, 4096), 512, {"micro_batch_size": 4, "activation_checkpointing": True}),
    ((512, 4, 4096), 512, {"micro_batch_size": 4, "precision": "bf16"}),
    ((1024, 4, 4096), 256, {"micro_batch_size": 2, "merge": True}),
    ((512, 4, 4096), 512, {"method": "full", "micro_batch_size": 2}),
    ((1024, 8, 32000), 256, {"method": "full", "micro_batch_size": 1}),
    ((1024, 8, 4096), 256, {"method": "last_layers", "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "nf4", "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "int8", "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "gptq", "micro_batch_size": 2}),
)


def spec_of(length: int, step: dict[str, Any]) -> JobSpec:
    few = {"steps": 2, "batch_size": 2 * step.get("micro_batch_size", 1)}  # as much memory as more would take
    steps = [{"kind": "finetune", "method": "lora"} | few | step]
    data = {"source": "file-abcdefgh", "sequence_length": length}
    return JobSpec.model_validate({"model": "bench/random", "steps": steps, "data": data, "evaluation": {"samples": 4}})


def work(model: Path, length: int, step: dict[str, Any]) -> None:
    """The whole job, in this process."""
    import torch

    from models.pipeline import run
    from models.progress import Silent

    torch.set_num_threads(1)
    folder = model.parent if model != BUNDLED else Path(tempfile.mkdtemp())
    run(inputs_of(spec_of(length, step), model, folder, length), Silent())


def inputs_of(spec: JobSpec, model: Path, folder: Path, length: int) -> Any:
    """Of a job that works in a folder, on the CPU, and learns from random words."""
    from models.job import Inputs

    folder.mkdir(parents=True, exist_ok=True)
    return Inputs(
        spec=spec,
        model=model,
        model_name="bench/random",
        calibration_text=_examples(folder / "rows.jsonl", length),
        work=folder / "work",
        out=folder / "out",
        device="cpu",
        job_id="job-benchmark",
    )


def foretold(model: Path, length: int, step: dict[str, Any]) -> TrainingMemory:
    """What a plan says of it."""
    from models.checkpoint import open_model

    spec, source = spec_of(length, step), open_model(model)
    training = spec.steps[0]
    tensors = {name: entry.shape for name, entry in source.entries.items()}
    return needed_to_train(
        source.shape(), spec, training, learned(training, source.config, tensors), dict.fromkeys(spec.formats, 0)
    )


def _examples(path: Path, length: int) -> Path:
    """Enough words for every sequence, some of several examples."""
    dice, words = random.Random(0), Path(random.__file__).read_text().split()
    rows = [{"text": " ".join(dice.choices(words, k=dice.randrange(20, length)))} for _ in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        model, length, step = json.loads(options.work)
        work(Path(model), length, step)
        return
    print("| model | length | step | job, MB | planned | all processes, MB | planned | off | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number in options.cases:
        (width, blocks, vocabulary), length, step = CASES[number]
        with tempfile.TemporaryDirectory() as folder:
            model = BUNDLED
            if width:
                model = Path(folder) / "model"
                make(model, blocks, width, vocabulary, positions=2048)
            planned = foretold(model, length, step)
            asked = json.dumps([str(model), length, step])
            seen = watch([sys.executable, __file__, "--work", asked])
        name = f"width {width}, {blocks} blocks, {vocabulary} tokens" if width else "bundled"
        told = ", ".join(str(value) if key == "method" else f"{key} {value}" for key, value in step.items())
        job, together = planned.job / seen.own - 1, planned.whole / seen.together - 1
        print(
            f"| {name} | {length} | {told} | {seen.own / 1e6:.0f} | {planned.job / 1e6:.0f} "
            f"| {seen.together / 1e6:.0f} | {planned.whole / 1e6:.0f} | {job:+.0%}, {together:+.0%} "
            f"| {seen.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
