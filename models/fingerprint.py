"""Of all that decides a result, so that leavings of another recipe, model or text are not resumed from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from models.files.checkpoint import SourceModel
from models.job import Named
from models.texts.material import Material
from squeeze import __version__
from squeeze.reports.training import TrainingData
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.merging import Merge
from squeeze.steps.schemes import Scheme
from squeeze.steps.training import Train

TARGETS = {"target_bits", "target_bytes"}  # decide nothing but the schemes


def fingerprint(
    spec: JobSpec,
    revision: str | None,
    device: str,
    source: SourceModel,
    texts: Material,
    schemes: Mapping[str, Scheme] | None = None,
) -> str:
    """revision: of the source; None: files that may change in place. schemes: where the steps alone don't say them."""
    parts = {
        "steps": [step.model_dump(mode="json", exclude=TARGETS) for step in spec.steps],
        "schemes": None if schemes is None else [f"{name} {scheme}" for name, scheme in schemes.items()],
        **_of_model(source, revision),
        "calibration": texts.calibration.text.model_dump() if texts.calibration else None,
        "windows": texts.windows.text.model_dump() if texts.windows else None,
        "device": device,
        "versions": [__version__, torch.__version__],
    }
    return _digest(parts)


def training_fingerprint(
    step: Train,
    seed: int,
    revision: str | None,
    device: str,
    source: SourceModel,
    data: TrainingData,
    length: int,
    student: tuple[SourceModel, str | None] | None = None,
    samples: int | None = None,
) -> str:
    """As `fingerprint`, of what a step that trains leaves. length: of a sequence, in tokens. student: with its
    revision, where another model learns. samples: sequences that a base is rounded on, where one is.

    Any number of processes goes on from it, whatever each of them holds.
    """
    parts = {
        "step": step.model_dump(mode="json", exclude={"sharding"}),
        "seed": seed,
        **_of_model(source, revision),
        "student": None if student is None else _of_model(*student),
        "data": data.model_dump(),
        "length": length,
        "samples": samples,
        "device": device,
        "versions": [
            __version__,
            torch.__version__,
            *map(version, ("transformers", "peft", "accelerate", "bitsandbytes")),
        ],
    }
    return _digest(parts)


def writing_fingerprint(
    step: Train, seed: int, revision: str | None, device: str, teacher: SourceModel, records: str, length: int
) -> str:
    """As `fingerprint`, of what a teacher writes. records: a digest of those that it ends."""
    parts = {
        "step": step.model_dump(mode="json"),
        "seed": seed,
        **_of_model(teacher, revision),
        "records": records,
        "length": length,
        "device": device,
        "versions": [__version__, torch.__version__, version("transformers")],
    }
    return _digest(parts)


def merging_fingerprint(
    step: Merge, seed: int, revision: str | None, base: SourceModel, merged: Sequence[Named]
) -> str:
    """As `fingerprint`, of what a step that merges leaves: the same on every device."""
    parts = {
        "step": step.model_dump(mode="json"),
        "seed": seed,
        **_of_model(base, revision),
        "merged": [[one.name, one.revision, None if one.revision else _written(one.directory)] for one in merged],
        "versions": [__version__, torch.__version__],
    }
    return _digest(parts)


def _written(directory: Path) -> list[list[object]]:
    """What tells whether files were changed in place."""
    files = sorted(file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _of_model(source: SourceModel, revision: str | None) -> dict[str, Any]:
    return {
        "model": [revision, source.config, source.weight_bytes, sorted(map(str, source.entries))],
        "written": None if revision else sorted({e.path.stat().st_mtime_ns for e in source.entries.values()}),
    }


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
