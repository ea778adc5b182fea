"""What the leader of several processes tells the others before they train together: where everything lies, and how the
weights are held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.job import Inputs
from models.progress import Notify
from models.resources import available_device_bytes, available_host_bytes
from models.streaming.team import Team
from models.train.prepare import Prepared
from models.train.processes import ALONE, Processes
from squeeze.errors import OutOfMemoryHost
from squeeze.specs.choosing import Choice
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill, Hidden, OnPolicy
from squeeze.steps.finetuning import Adapters, Full, QLoRA
from squeeze.steps.sharding import ZERO_STAGES, Way, state_bytes, way_for

WORDS: dict[Way, str] = {
    "ddp": "each of them holds all weights",
    "full": "each of them holds a part of the weights",
    "hybrid": "each half of them holds all weights, each process a part",
    "offload": "each of them holds a part of the weights, in host memory until its turn comes",
    "zero1": "each of them holds all weights, and a part of the optimizer's state",
    "zero2": "each of them holds all weights, and a part of their gradients and of the optimizer's state",
    "zero3": "each of them holds a part of the weights, by DeepSpeed",
}
PATHS = ("model", "student", "teacher", "calibration_text", "evaluation_text", "work", "out")
TEXTS = (
    "model_name",
    "student_name",
    "student_revision",
    "revision",
    "digest",
    "student_digest",
    "license",
    "calibration_origin",
    "evaluation_origin",
    "job_id",
)
LOADED_BYTES = 1.2  # of host memory for each byte of a model while it is loaded


def lead(team: Team, prepared: Prepared, inputs: Inputs, places: Sequence[Path | None], notify: Notify) -> Processes:
    """Decides how the weights are held, and tells the others what they need. places: of what will be written."""
    if team.size == 1:
        return ALONE
    way, at_once = _way(prepared, team), _fits_often(prepared, team.size)
    if way in ZERO_STAGES and not at_once:
        raise OutOfMemoryHost(
            f"DeepSpeed takes the model over from all {team.size} processes at the same time, and host memory has not "
            "room for as many copies: take sharding full, for which they load it one after the other"
        )
    notify.event("info", f"{team.size} processes share the training; {WORDS[way]}", sharding=way)
    paths = {name: getattr(inputs, name) for name in PATHS}
    team.tell(
        {
            "way": way,
            "at_once": at_once,
            "mark": prepared.mark,
            "choices": [one.model_dump() for one in prepared.choices.made] if prepared.choices else [],
            "places": [_text(path) for path in places],
            "paths": {name: _text(path) for name, path in paths.items()},
            "texts": {name: getattr(inputs, name) for name in TEXTS},
            "activation_bytes": inputs.activation_bytes,
        }
    )
    return Processes(team, way, at_once)


@dataclass(frozen=True)
class Told:
    """What the leader said. mark: of all that decides the result. choices: for every `auto`. places: of what will be
    written.
    """

    inputs: Inputs
    processes: Processes
    mark: str
    choices: list[Choice]
    places: list[Path | None]


def told(team: Team, spec: JobSpec) -> Told:
    """As the leader has it, but for the device, which is this process's own."""
    heard = team.tell(None)
    paths: dict[str, Any] = {name: _path(text) for name, text in heard["paths"].items()}
    inputs = Inputs(
        spec=spec,
        device=str(team.device),
        activation_bytes=heard["activation_bytes"],
        **paths,
        **heard["texts"],
    )
    processes = Processes(team, heard["way"], heard["at_once"])
    choices = [Choice.model_validate(one) for one in heard["choices"]]
    return Told(inputs, processes, heard["mark"], choices, [_path(text) for text in heard["places"]])


def _way(prepared: Prepared, team: Team) -> Way:
    step, parameters = prepared.step, prepared.source.parameters
    if step.sharding != "auto":
        return step.sharding
    if isinstance(step, QLoRA | Hidden | OnPolicy):
        return "ddp"
    learning = sum(site.rows * site.columns for site in prepared.sites)
    if isinstance(step, Adapters):
        learning = 0  # they are small beside the model
    elif isinstance(step, Full | Distill):
        learning = parameters
    free = available_device_bytes(team.device)
    if team.device.type == "cpu":
        free //= team.size
    return way_for(state_bytes(parameters, learning, prepared.dtype.itemsize), free, team.size)


def _fits_often(prepared: Prepared, times: int) -> bool:
    """Whether host memory holds the model so many times, in the type that it begins to train in."""
    each = prepared.dtype if isinstance(prepared.step, Adapters) else torch.float32
    return prepared.source.parameters * each.itemsize * LOADED_BYTES * times <= available_host_bytes()


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
