"""A small training: records, the job that learns from them, and the loop over them."""

import json
import random
from pathlib import Path
from typing import Any

from models.distill.lesson import Lesson
from models.job import Inputs
from models.resources import Clock
from models.train.bases import rounded_base
from models.train.checkpoints import Checkpoints, Story
from models.train.loop import train
from models.train.prepare import Prepared, begun, prepare
from models.train.task import Task, accelerator_of
from squeeze.reports.training import TrainingStep
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill
from squeeze.steps.training import Train
from tests.models.job_parts import Heard, inputs_of

QUICK: dict[str, Any] = {"steps": 12, "learning_rate": 0.01, "batch_size": 4}


def spec_of(step: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    asked = {"kind": "finetune", "method": "lora"} | QUICK | (step or {})
    steps = [asked | ({"rank": 4} if asked["method"] == "lora" and "rank" not in asked else {})]
    data = {"source": "file-abcdefgh", "sequence_length": 48}
    return JobSpec.model_validate({"model": "org/model", "steps": steps, "data": data} | changes)


def sums(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    dice = random.Random(seed)
    pairs = [(dice.randrange(90), dice.randrange(90)) for _ in range(count)]
    return [{"prompt": f"{a} + {b} = ", "completion": f"{a + b}, no more"} for a, b in pairs]


def kinds(count: int = 30) -> list[dict[str, Any]]:
    """Texts of three unlike kinds, half of them sums."""
    dice = random.Random(1)
    words = [" ".join(f"word{dice.randrange(300)}" for _ in range(30)) for _ in range(count // 2)]
    lists = [json.dumps([dice.randrange(1000) for _ in range(20)]) for _ in range(count // 2)]
    named = [{"text": text, "kind": kind} for kind, texts in (("words", words), ("lists", lists)) for text in texts]
    return [one | {"kind": "sums"} for one in sums(count)] + named


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def inputs_for(spec: JobSpec, model: Path, room: Path, rows: list[Any] | None = None) -> Inputs:
    room.mkdir(parents=True, exist_ok=True)
    return inputs_of(spec, model, written(room / "rows.jsonl", sums() if rows is None else rows), room)


def begin(inputs: Inputs, heard: Heard | None = None) -> tuple[Prepared, Task]:
    step = inputs.spec.steps[0]
    assert isinstance(step, Train)
    prepared = prepare(inputs, step)
    base = rounded_base(prepared, inputs, Clock(), heard or Heard())
    task = begun(prepared, None if base is None else base.codes)[0]
    return prepared, Lesson(prepared, inputs, Heard()).given(task) if isinstance(step, Distill) else task


def go_on(inputs: Inputs, heard: Heard | None = None) -> tuple[Task, Story]:
    """The loop, from where an earlier process of the same room stopped."""
    prepared, task = begin(inputs, heard)
    checkpoints = Checkpoints(inputs.work / "train", prepared.mark)
    accelerator = accelerator_of(prepared.precision, prepared.device)
    return task, train(task, accelerator, checkpoints, heard or Heard(), inputs.snapshot_seconds)


def seen(story: Story) -> list[tuple[float, float, float]]:
    """What a training must repeat to the bit."""
    return seen_in(story.curve)


def seen_in(curve: list[TrainingStep]) -> list[tuple[float, float, float]]:
    """As `seen`."""
    return [(one.loss, one.learning_rate, one.gradient_norm) for one in curve]
