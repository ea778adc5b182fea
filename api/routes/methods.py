"""What can be asked for: every method with its parameters."""

import inspect
from typing import Any

from fastapi import APIRouter

from api.auth import Project
from api.problems import refusals
from squeeze.architectures import ARCHITECTURES, HELD_BY
from squeeze.errors import ServiceUnavailable, Unauthenticated
from squeeze.formats import CAPACITIES
from squeeze.objects import Method, Page
from squeeze.steps import METHODS, Quantize, tag_of

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("", summary="List methods", responses=refusals(Unauthenticated, ServiceUnavailable))
def list_methods(project: Project) -> Page[Method]:  # noqa: ARG001 (asked for so that a key is needed)
    """Every method: its kind, the JSON schema of its step, the architectures and formats that it goes with."""
    found = [_method(step) for step in METHODS]
    return Page(data=found, has_more=False, first_id=found[0].method, last_id=found[-1].method)


def _method(step: type[Quantize]) -> Method:
    kind, method = tag_of(step).split(".")
    return Method(
        kind=kind,
        method=method,
        description=inspect.getdoc(step) or "",
        parameters=step.model_json_schema(),
        architectures=list(ARCHITECTURES),
        formats={name: _capacity(name) for name in CAPACITIES},
        needs=["calibration data"] if step.needs_calibration else [],
    )


def _capacity(name: Any) -> dict[str, Any]:
    capacity = CAPACITIES[name]
    return {
        "bits": list(capacity.bits),
        "group_sizes": list(capacity.group_sizes),
        "asymmetric": capacity.asymmetric,
        "consumers": list(capacity.consumers),
        "architectures": [each for each in ARCHITECTURES if name in HELD_BY[each]],
    }
