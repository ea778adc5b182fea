"""A quantize step done by one process or several: the leader says what is to be done, the others do their share of it.

Only the leader has read the text, allotted bits and asked for anything; what decides the result goes from it to the
others, who open the model themselves.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel, open_model
from models.ggml.ends import RoundedEnds
from models.progress import Notify, Silent
from models.quantize.rotation import Rotated
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.snapshots import SNAPSHOT_SECONDS
from models.streaming.team import Team
from models.texts.data import Windows
from models.weights.plain import TYPES
from squeeze.reports.parts import Text
from squeeze.steps.compressing import Compress
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class Frames:
    """reference: the original. result: what is compressed, which a cast, a rotation or K-quants change first.

    turned: the rotated source. target: the type of a cast. source: the model that the step is given.
    """

    reference: Frame
    result: Frame
    turned: Rotated | None
    target: torch.dtype | None
    source: SourceModel


def frames_of(source: SourceModel, step: Compress, device: torch.device, original: SourceModel | None = None) -> Frames:
    """original: what the result is compared with, where that isn't the source."""
    own = Frame(source, compute_dtype(source.dtype, device), device)
    reference = own if original is None else Frame(original, compute_dtype(original.dtype, device), device)
    target = TYPES.get(step.scheme().element)
    result = own if target is None else Frame(source, compute_dtype(target, device), device, stored=target)
    turned = Rotated.of(source) if step.rotates else None
    if turned is not None:
        result = Frame(turned, own.dtype, device)
    if step.scheme().element == "ggml":
        result = Frame(RoundedEnds.of(result), own.dtype, device)
    return Frames(reference, result, turned, target, source)


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that activations are computed in: as stored; but nobody needs float64, and CPUs have no fast float16."""
    exact = stored == torch.float64 or (stored == torch.float16 and device.type == "cpu")
    return torch.float32 if exact else stored


def lead(
    team: Team,
    frames: Frames,
    step: Compress,
    calibration: Tensor | None,
    windows: Windows | None,
    directory: Path,
    fingerprint: str,
    notify: Notify,
    *,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
    schemes: Mapping[str, Scheme] | None = None,
    memory_bytes: int | None = None,
    method: Any = None,
) -> engine.Quantization:
    """As `engine.quantize`, with the others of the team, who are in `follow`."""
    if team.size > 1:
        notify.event("info", f"{team.size} processes share the calibration and the evaluation text")
    with team.together():
        team.tell(
            {
                "source": str(frames.source.path.absolute()),
                "original": str(frames.reference.source.path.absolute()),
                "directory": str(directory.absolute()),
                "fingerprint": fingerprint,
                "schemes": None if schemes is None else {name: asdict(scheme) for name, scheme in schemes.items()},
                "windows": None if windows is None else _described(windows),
                "memory_bytes": memory_bytes,
            }
        )
        team.tensors({} if calibration is None else {"calibration": calibration})
        team.tensors({} if windows is None else {"windows": windows.ids})
        return engine.quantize(
            frames.result,
            step,
            calibration,
            windows,
            directory,
            fingerprint,
            notify,
            snapshot_seconds,
            memory_bytes=memory_bytes,
            reference=frames.reference,
            schemes=schemes,
            team=team,
            method=method,
        )


def follow(team: Team, step: Compress) -> None:
    """Waits for the leader, and does one process's share of the step. The result is the leader's."""
    with team.together():
        told = team.tell(None)
        calibration, ids = team.tensors({}).get("calibration"), team.tensors({}).get("windows")
        source, original = (open_model(Path(told[name])) for name in ("source", "original"))
        frames = frames_of(source, step, team.device, None if original.path == source.path else original)
        schemes = told["schemes"]
        engine.quantize(
            frames.result,
            step,
            calibration,
            None if ids is None else _windows(ids, told["windows"]),
            Path(told["directory"]),
            told["fingerprint"],
            Silent(),
            memory_bytes=told["memory_bytes"],
            reference=frames.reference,
            schemes=None if schemes is None else {name: Scheme(**fields) for name, fields in schemes.items()},
            team=team,
        )


def _described(windows: Windows) -> list[object]:
    return [windows.first_scored, windows.stride, windows.text.model_dump(mode="json")]


def _windows(ids: Tensor, described: list[object]) -> Windows:
    first_scored, stride, text = described
    return Windows(ids, tuple(first_scored), stride, Text.model_validate(text))  # type: ignore[arg-type]
