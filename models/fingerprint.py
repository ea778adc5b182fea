"""Of all that decides a result, so that leavings of another recipe, model or text are not resumed from."""

import hashlib
import json
from collections.abc import Mapping

import torch

from models.checkpoint import SourceModel
from models.material import Material
from squeeze import __version__
from squeeze.schemes import Scheme
from squeeze.specs import JobSpec

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
        "model": [revision, source.config, source.weight_bytes, sorted(map(str, source.entries))],
        "written": None if revision else sorted({e.path.stat().st_mtime_ns for e in source.entries.values()}),
        "calibration": texts.calibration.text.model_dump() if texts.calibration else None,
        "windows": texts.windows.text.model_dump() if texts.windows else None,
        "device": device,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
