"""Peak host memory of a training against what a plan says of it: `python benchmarks/training_memory.py [--cases 0 …]`.

Makes random Llamas, trains each for two steps, or a student of theirs, in a process of its own (examples, training,
evaluation, writing, certification), and prints the largest resident size of the job's process and the largest sum over
all of its processes at one moment, each with what a plan says of it.
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
from squeeze.costs.distillation_memory import DistillationMemory, needed_to_distill
from squeeze.costs.distillation_work import lessons
from squeeze.costs.trainable import learned
from squeeze.costs.training_memory import TrainingMemory, needed_to_train
from squeeze.shapes.model import of_blocks, shape_of
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill, evenly
from squeeze.steps.training import Train

# Students: two blocks of their teacher, and two blocks of half the width that most of these have.
CUT: dict[str, Any] = {"layers": 2}
NARROW: dict[str, Any] = {"model": "bench/512-2"}
BF16 = {"precision": "bf16"}
MOVEMENT: dict[str, Any] = {"kind": "prune", "method": "movement", "steps": 3, "ramp_end": 0.5}

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
    ((1024, 4, 4096), 256, BF16 | {"method": "full", "micro_batch_size": 2}),
    ((512, 4, 4096), 512, MOVEMENT | {"micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "last_layers", "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "nf4", "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "int8", "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "gptq", "micro_batch_size": 2}),
    ((512, 4, 4096), 512, {"method": "logits", "student": CUT, "micro_batch_size": 2}),
    ((1024, 4, 32000), 256, {"method": "logits", "student": CUT, "micro_batch_size": 2}),
    ((512, 4, 4096), 512, {"method": "logits", "top_k": "all", "student": CUT, "micro_batch_size": 2}),
    ((1024, 4, 4096), 256, BF16 | {"method": "logits", "top_k": "all", "student": CUT, "micro_batch_size": 2}),
    ((512, 4, 4096), 512, {"method": "hidden", "student": CUT, "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "hidden", "student": NARROW, "micro_batch_size": 2}),
    ((512, 4, 4096), 512, {"method": "hidden", "match": "relations", "student": CUT, "micro_batch_size": 2}),
    ((512, 4, 4096), 512, {"method": "sequence", "new_tokens": 64, "student": CUT, "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "sequence", "new_tokens": 64, "student": NARROW, "micro_batch_size": 2}),
    ((512, 4, 4096), 512, {"method": "on_policy", "student": CUT, "micro_batch_size": 2}),
    ((1024, 8, 4096), 256, {"method": "on_policy", "student": NARROW, "micro_batch_size": 2}),
)
DISTILLING = ("logits", "hidden", "sequence", "on_policy")
RECORDS, RECORDS_TAUGHT = 100, 24  # of which a teacher reads or goes on with all


def spec_of(length: int, step: dict[str, Any]) -> JobSpec:
    few = {"steps": 2, "batch_size": 2 * step.get("micro_batch_size", 1)}  # as much memory as more would take
    steps = [{"kind": "distill" if step.get("method") in DISTILLING else "finetune", "method": "lora"} | few | step]
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
    """Of a job that works in a folder, on the CPU, and learns from random words. A student stands beside the model."""
    from models.job import Inputs

    folder.mkdir(parents=True, exist_ok=True)
    named = next((name for param, name in spec.models.items() if param.endswith(".student.model")), None)
    return Inputs(
        student=model.parent / "student" if named else None,
        student_name=named,
        spec=spec,
        model=model,
        model_name="bench/random",
        calibration_text=_examples(folder / "rows.jsonl", length, spec.steps[0]),
        work=folder / "work",
        out=folder / "out",
        device="cpu",
        job_id="job-benchmark",
    )


def foretold(model: Path, length: int, step: dict[str, Any]) -> TrainingMemory | DistillationMemory:
    """What a plan says of it."""
    from models.files.checkpoint import open_model

    spec, source = spec_of(length, step), open_model(model)
    (training,) = spec.steps
    assert isinstance(training, Train)
    tensors, formats = {name: entry.shape for name, entry in source.entries.items()}, dict.fromkeys(spec.formats, 0)
    if not isinstance(training, Distill):
        return needed_to_train(source.shape(), spec, training, learned(training, source.config, tensors), formats)
    if training.student.layers is not None:
        kept = evenly(len(source.shape().blocks), training.student.layers)
        tensors, config = of_blocks(tensors, kept), source.config
    else:
        other = open_model(model.parent / "student")
        tensors, config = {name: entry.shape for name, entry in other.entries.items()}, other.config
    text_bytes = _examples(model.parent / "rows.jsonl", length, training).stat().st_size
    told, student = lessons(spec, training, length, text_bytes, RECORDS_TAUGHT), shape_of(config, tensors)
    return needed_to_distill(source.shape(), student, spec, training, learned(training, config, tensors), formats, told)


def _examples(path: Path, length: int, step: Any) -> Path:
    """Enough words for every sequence, some of several examples."""
    dice, words = random.Random(0), Path(random.__file__).read_text().split()
    count = RECORDS_TAUGHT if isinstance(step, Distill) else RECORDS
    rows = [{"text": " ".join(dice.choices(words, k=dice.randrange(20, length)))} for _ in range(count)]
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
                if (student := step.get("student", {}).get("model")) is not None:
                    narrower, fewer = map(int, student.rpartition("/")[2].split("-"))
                    make(model.parent / "student", fewer, narrower, vocabulary, positions=2048)
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
