"""Specs of jobs that prune, as small as they come."""

from typing import Any

from squeeze.specs.job_spec import JobSpec

SIZES: dict[str, Any] = {"data": {"samples": 16, "sequence_length": 64}, "evaluation": {"samples": 4}}


def spec_of(*steps: dict[str, Any], **fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "org/model", "steps": steps} | SIZES | fields)


def zeroing(method: str = "magnitude", **fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": method} | fields
