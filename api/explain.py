"""Validation errors in words: which field, what it holds, what it takes, and which name was probably meant."""

import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from squeeze.errors import BodyInvalid, CursorInvalid, SpecInvalid, SqueezeError
from squeeze.steps.every import STEPS, tag_of

TOLD_AT_MOST = 5
SHOWN_CHARACTERS = 60

_TAGGED = {tag_of(method): method for method in STEPS}
_WHOLE = "body"
_OUTSIDE = {"query", "path", "header", "cookie"}


def explain(errors: Iterable[Mapping[str, Any]], root: type[BaseModel]) -> SqueezeError:
    """One error for what pydantic or FastAPI found; `root` is the model that a JSON body has.

    The message names each field in dots (`steps.0.bits`), the first one is `param`. A misspelt name gets the nearest
    right one and the list of what there is.
    """
    found = [dict(error) for error in errors]
    unreadable = next((error for error in found if error["type"] == "json_invalid"), None)
    if unreadable is not None:
        return BodyInvalid(f"The body is not JSON: {unreadable['ctx']['error']}.")
    kept = sorted(_without_echoes(found), key=lambda error: error["type"] != "extra_forbidden")  # a typo explains best
    told = [_tell(error, root) for error in kept]
    params = [param for param, _ in told]
    message = " ".join(sentence for _, sentence in told[:TOLD_AT_MOST])
    if len(told) > TOLD_AT_MOST:
        message += f" And {len(told) - TOLD_AT_MOST} more."
    if params == ["after"]:
        return CursorInvalid(message, param="after")
    if params == [_WHOLE]:
        return BodyInvalid(message)
    return SpecInvalid(message, param=params[0] or None)


def one_of(value: object, known: Sequence[str]) -> str:
    """`did you mean …?` where a known name is near, and the list of them all."""
    near = get_close_matches(str(value), known, n=1, cutoff=0.5)
    return (f"did you mean `{near[0]}`? " if near else "") + f"There is {_listed([f'`{name}`' for name in known])}."


def _without_echoes(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out what only follows: a tuple is `too short` once its only item is wrong, and a default that is made
    from other fields is not made while one of them is wrong.
    """
    errors = [error for error in errors if error["type"] != "default_factory_not_called"]
    places = [tuple(error["loc"]) for error in errors]
    return [
        error
        for error, place in zip(errors, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def _tell(error: dict[str, Any], root: type[BaseModel]) -> tuple[str, str]:
    """(field in dots, sentence about it)."""
    loc = tuple(error["loc"])
    if loc and loc[0] in _OUTSIDE:
        return _tell_parameter(loc, error)
    if loc and loc[0] == "body":
        loc = loc[1:]
    kind = error["type"]
    param = _dotted(loc)
    if not loc and kind == "value_error":  # a rule between fields
        reason = _reason(error)
        return "", f"{reason[:1].upper()}{reason[1:]}."
    if not loc:
        return _WHOLE, "The body must be a JSON object, sent with `Content-Type: application/json`."
    if kind == "union_tag_invalid":
        return _tell_method(param, error["input"])
    if kind == "extra_forbidden":
        known = _fields_at(root, loc[:-1])
        owner = next((_TAGGED[part].__name__ for part in loc[:-1] if part in _TAGGED), None)
        where = f"of {owner}" if owner else "here"
        return param, f"`{param}` is not a field {where}: {one_of(loc[-1], known)}"
    if kind == "missing":
        return param, f"`{param}` is missing."
    if kind == "literal_error":
        near = get_close_matches(str(error["input"]), _literals(error), n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return param, f"`{param}` is {_shown(error['input'])}; it takes {error['ctx']['expected']}.{hint}"
    return param, f"`{param}`: {_reason(error)}."


def _tell_parameter(loc: tuple[Any, ...], error: dict[str, Any]) -> tuple[str, str]:
    name = str(loc[-1])
    if error["type"] == "missing":
        return name, f"The {loc[0]} parameter `{name}` is missing."
    return name, f"The {loc[0]} parameter `{name}` is {_shown(error.get('input'))}: {_reason(error)}."


def _tell_method(param: str, step: Any) -> tuple[str, str]:
    """A step whose kind and method name nothing that there is."""
    kinds = sorted({tag.split(".")[0] for tag in _TAGGED})
    if not isinstance(step, Mapping):
        return param, f"`{param}` is {_shown(step)}; a step is an object with `kind` and `method`, for example " + (
            '{"kind": "quantize", "method": "gptq", "bits": 4}.'
        )
    kind, method = step.get("kind"), step.get("method")
    if "kind" not in step:
        return f"{param}.kind", f"`{param}.kind` is missing. There is {_listed([f'`{each}`' for each in kinds])}."
    if kind not in kinds:
        return f"{param}.kind", f"`{param}.kind` is {_shown(kind)}, which is not a kind of step: {one_of(kind, kinds)}"
    methods = [tag.split(".")[1] for tag in _TAGGED if tag.startswith(f"{kind}.")]
    if "method" not in step:
        return f"{param}.method", f"`{param}.method` is missing. {one_of('', methods)}"
    wrong = f"`{param}.method` is {_shown(method)}, which is no way to {kind}"
    return f"{param}.method", f"{wrong}: {one_of(method, methods)}"


def _fields_at(root: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The names of the fields of the model that stands at `loc` inside `root`."""
    here: Any = root
    for part in loc:
        if part in _TAGGED:
            here = _TAGGED[part]
        elif isinstance(part, int):
            here = get_args(here)[0]
        else:
            here = _bare(here.model_fields[part].annotation)
    return list(here.model_fields)


def _bare(annotation: Any) -> Any:
    """An annotation without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return _bare(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation


def _dotted(loc: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in loc if part not in _TAGGED and part != "[key]")


def _reason(error: dict[str, Any]) -> str:
    """Pydantic's own words, as the rest of a sentence."""
    message = str(error["msg"]).rstrip(".")
    for opening in ("Value error, ", "Input ", "String ", "Tuple "):
        message = message.removeprefix(opening)
    return message[:1].lower() + message[1:]


def _literals(error: dict[str, Any]) -> list[str]:
    return [word.strip("' ") for word in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
