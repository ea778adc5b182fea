"""A small job as the worker hands it to the pipeline, and what it leaves and tells."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.pipeline import Inputs
from models.progress import Silent
from squeeze.objects import Stage
from squeeze.specs.job_spec import JobSpec

BOTH = ["compressed-tensors", "gptq"]


def spec_of(step: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    steps = [{"kind": "quantize", "method": "gptq", "group_size": 32} | (step or {})]
    sizes: dict[str, Any] = {"data": {"samples": 16, "sequence_length": 64}, "evaluation": {"samples": 4}}
    return JobSpec.model_validate({"model": "org/model", "steps": steps, "formats": BOTH} | sizes | changes)


def inputs_of(spec: JobSpec, model: Path, text: Path | None, room: Path) -> Inputs:
    (room / "out").mkdir(parents=True, exist_ok=True)
    return Inputs(
        spec=spec,
        model=model,
        model_name="org/model",
        revision="0123abc",
        license="mit",
        calibration_text=text,
        work=room / "work",
        out=room / "out",
        device="cpu",
        job_id="job-x",
        snapshot_seconds=0.0,
    )


def digests(out: Path) -> dict[str, str]:
    """Of what the formats wrote; the card tells of times and so differs from run to run."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in {"README.md", "report.json"})
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclasses.dataclass
class Heard(Silent):
    """What a run told."""

    stages: list[Stage] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)
    expected: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def expect(self, work: Mapping[str, float]) -> None:
        self.expected.append(dict(work))

    def stage(self, stage: Stage) -> None:
        self.stages.append(stage)

    def event(self, kind: str, message: str, **data: Any) -> None:
        self.messages.append(message)
