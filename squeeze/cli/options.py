"""Command-line options made from pydantic fields, so that a method that gains a parameter needs no edit here."""

import json
import types
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    AnyParamType = click.ParamType[Any]
else:  # generic since click 8.5 alone
    AnyParamType = click.ParamType

TOLD_APART_BY = frozenset({"kind", "method"})


class OneOf(AnyParamType):
    """The values of a `Literal`, which may mix numbers and words: `32`, `channel`."""

    name = "choice"

    def __init__(self, values: Sequence[object]) -> None:
        self.values = {str(value): value for value in values}

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        return f"[{'|'.join(self.values)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) not in self.values:
            self.fail(f"{value!r} is not one of {', '.join(self.values)}.", param, ctx)
        return self.values[str(value)]


class Json(AnyParamType):
    """Whatever has no simpler form: JSON, or a word that stands for itself."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value


def step_options(methods: Sequence[type[BaseModel]]) -> list[click.Option]:
    """One option for every parameter that any of the methods takes; the help says where not all of them take it."""
    takers: dict[str, list[type[BaseModel]]] = {}
    for method in methods:
        for name in method.model_fields.keys() - TOLD_APART_BY:
            takers.setdefault(name, []).append(method)
    in_order = dict.fromkeys(name for method in methods for name in method.model_fields if name in takers)
    options = []
    for name in in_order:
        some = takers[name]
        field = copy(some[0].model_fields[name])
        note = "" if len(some) == len(methods) else f"{', '.join(map(method_name, some))} only"
        alike = all(method.model_fields[name].annotation == field.annotation for method in some)
        field.description = _described(name, some)
        options.append(option(name, field, note=note, kind=None if alike else Json()))
    return options


def _described(name: str, methods: Sequence[type[BaseModel]]) -> str:
    """What methods say of their parameter of one name; where they differ, each after its own."""
    said: dict[str, list[str]] = {}
    for method in methods:
        said.setdefault(method.model_fields[name].description or "", []).append(method_name(method))
    if len(said) == 1:
        return next(iter(said))
    return " ".join(f"{', '.join(names)}: {text}" for text, names in said.items())


def method_name(method: type[BaseModel]) -> str:
    """The wire name of a step's class: `gptq`."""
    return str(get_args(method.model_fields["method"].annotation)[0])


def field_option(model: type[BaseModel], field: str, name: str | None = None) -> Callable[..., Any]:
    """A decorator that adds the option of one field."""
    made = option(name or field, model.model_fields[field])

    def add(command: click.Command) -> click.Command:
        command.params.append(made)
        return command

    return add


def option(name: str, field: FieldInfo, *, note: str = "", kind: AnyParamType | None = None) -> click.Option:
    """The option of one field. Its value is None, or empty, where the user gave none: the service knows the default."""
    flag = "--" + name.replace("_", "-")
    default = field.get_default(call_default_factory=True, validated_data={})
    notes = [note] if note else []
    if field.annotation is bool:
        notes.append(f"default: {flag if default else '--no-' + flag[2:]}")
        declaration = f"{flag}/--no-{flag[2:]}"
        return click.Option([declaration, name], default=None, help=_help(field, notes))
    if not field.is_required() and default not in (None, ()):
        notes.append(f"default: {default}")
    found, many = _type_of(field.annotation, field.metadata)
    if many:
        notes.append("may be given several times")
    return click.Option([flag, name], type=kind or found, multiple=many, default=None, help=_help(field, notes))


def given(values: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Those of `fields` that the user gave."""
    return {name: values[name] for name in fields if values.get(name) not in (None, (), {})}


def _help(field: FieldInfo, notes: Sequence[str]) -> str:
    text = (field.description or "").replace("`", "")
    return f"{text} [{'; '.join(notes)}]" if notes else text


def _type_of(annotation: Any, metadata: Sequence[Any]) -> tuple[AnyParamType, bool]:
    """click's type for an annotation, and whether the option may be repeated."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_of(inner[0], [*metadata, *inner[1:]])
    if origin in (Union, types.UnionType):
        some = [kind for kind in inner if kind is not types.NoneType]
        return _type_of(some[0], metadata) if len(some) == 1 else (Json(), False)
    if origin is Literal:
        return OneOf(inner), False
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return _type_of(inner[0], [])[0], True
    if annotation is int:
        return click.IntRange(**_bounds(metadata)), False
    if annotation is float:
        return click.FloatRange(**_bounds(metadata)), False
    return (click.STRING, False) if annotation is str else (Json(), False)


def _bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    """click's words for what pydantic keeps as objects with one of `ge`, `gt`, `le`, `lt`."""
    bounds: dict[str, Any] = {}
    for word, side, is_open in (("ge", "min", False), ("gt", "min", True), ("le", "max", False), ("lt", "max", True)):
        for bound in metadata:
            if hasattr(bound, word):
                bounds |= {side: getattr(bound, word), f"{side}_open": is_open}
    return bounds
