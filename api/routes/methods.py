"""What can be asked for: every method with its parameters."""

import inspect
import json
from importlib.resources import files
from typing import Any

from fastapi import APIRouter

from api.auth import Project
from api.problems import refusals
from squeeze.errors import ServiceUnavailable, Unauthenticated
from squeeze.names import Format
from squeeze.objects import Load, Method, Page
from squeeze.shapes.architectures import ARCHITECTURES, HELD_BY
from squeeze.specs.formats import CAPACITIES
from squeeze.steps.compressing import Compress
from squeeze.steps.every import STEPS, tag_of
from squeeze.steps.every import Method as Step
from squeeze.steps.finetuning import Adapters, Finetune, Head, QLoRA
from squeeze.steps.merging import Merge
from squeeze.steps.schemes import Scheme
from squeeze.steps.slimming import Slim, Vocabulary
from squeeze.steps.training import Train

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("", summary="List methods", responses=refusals(Unauthenticated, ServiceUnavailable))
def list_methods(project: Project) -> Page[Method]:  # noqa: ARG001 (asked for so that a key is needed)
    """Every method: its kind, the JSON schema of its step, the architectures and formats that it goes with."""
    return Page.of([_method(step) for step in STEPS], False, lambda one: one.method)


def _method(step: Step) -> Method:
    kind, method = tag_of(step).split(".")
    told: dict[str, Any] = {"method": method}
    usual = step.model_construct(**told)
    return Method(
        kind=kind,
        method=method,
        description=inspect.getdoc(step) or "",
        parameters=step.model_json_schema(),
        architectures=list(ARCHITECTURES),
        formats=_formats(usual.scheme()) if isinstance(usual, Compress) else _trained_formats(usual),
        loads=[Load.model_validate(one) for one in _loads() if one.pop("method") == method],
        needs=_needs(usual),
    )


def _needs(step: Compress | Train | Merge | Slim) -> list[str]:
    if isinstance(step, Merge):
        return ["models or adapters of one base"]
    if isinstance(step, Head):
        return ["training data with labels"]
    if isinstance(step, Train):
        return ["training data"] if isinstance(step, Finetune) else []
    if isinstance(step, Vocabulary):
        return ["a text of your own"]
    return ["calibration data"] if step.needs_calibration else []


def _trained_formats(step: Train | Merge | Slim) -> dict[str, dict[str, Any]]:
    """What a job is written as that ends with another step than one that quantizes: the adapter, and the whole model
    where one is.
    """
    merges = isinstance(step, Adapters) and step.mergeable
    able = step.writable if isinstance(step, Train) else step.formats
    names: tuple[Format, ...] = ("peft", "safetensors") if merges else able
    held: dict[str, dict[str, Any]] = {
        name: {"consumers": list(CAPACITIES[name].consumers), "architectures": list(ARCHITECTURES)} for name in names
    }
    if isinstance(step, QLoRA):  # what it is beside, where that is written
        held["gptq"] = {
            "consumers": list(CAPACITIES["gptq"].consumers),
            "architectures": [each for each in ARCHITECTURES if "gptq" in HELD_BY[each]],
        }
    return held


def _loads() -> list[dict[str, Any]]:
    """What `make table` saw, method by method."""
    found: list[dict[str, Any]] = json.loads(files("squeeze").joinpath("loads.json").read_text(encoding="utf-8"))
    return found


def _formats(scheme: Scheme) -> dict[str, dict[str, Any]]:
    """What each format that holds this kind of codes can hold of it."""
    found: dict[str, dict[str, Any]] = {}
    for name, capacity in CAPACITIES.items():
        for held in capacity.held:
            if held.element == scheme.element and scheme.activations in held.activations:
                found[name] = {
                    "bits": list(held.bits),
                    "group_sizes": list(held.group_sizes),
                    "asymmetric": held.asymmetric,
                    "consumers": list(capacity.consumers),
                    "architectures": [each for each in ARCHITECTURES if name in HELD_BY[each]],
                }
    return found
