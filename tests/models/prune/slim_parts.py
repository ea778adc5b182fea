"""Small jobs that make a model smaller."""

import random
from pathlib import Path
from typing import Any

from models.prune.slimming.smaller import Done, slimmed
from models.resources import Clock
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.slimming import Slim
from tests.models.job_parts import Heard, inputs_of


def text(path: Path) -> Path:
    """Words that were drawn."""
    dice = random.Random(0)
    path.write_text("\n".join(" ".join(f"word{dice.randrange(300)}" for _ in range(60)) for _ in range(100)))
    return path


def spec_of(step: dict[str, Any], *more: dict[str, Any], **changes: Any) -> JobSpec:
    steps = [{"kind": "prune", "method": "depth"} | step, *more]
    data = {"source": "file-abcdefgh", "samples": 4, "sequence_length": 64}
    sizes: dict[str, Any] = {"data": data, "evaluation": {"samples": 2}}
    return JobSpec.model_validate({"model": "org/model", "steps": steps} | sizes | changes)


def slim(step: dict[str, Any], model: Path, room: Path, heard: Heard | None = None) -> Done:
    room.mkdir(exist_ok=True)
    inputs = inputs_of(spec_of(step), model, text(room / "text"), room)
    asked = inputs.spec.steps[0]
    assert isinstance(asked, Slim)
    return slimmed(inputs, asked, Clock(), heard or Heard())
