"""Writes the catalogue of methods and formats into docs/methods.md: `python scripts/document_methods.py`.

What stands between the marks is replaced, the rest of the page is written by hand.
"""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.document_report import type_name  # noqa: E402
from squeeze.specs.formats import CAPACITIES, Capacity, holders  # noqa: E402
from squeeze.steps.distillation import DISTILLING_METHODS, Distill, Student  # noqa: E402
from squeeze.steps.every import Method, tag_of  # noqa: E402
from squeeze.steps.factoring import SVD  # noqa: E402
from squeeze.steps.finetuning import TRAINING_METHODS  # noqa: E402
from squeeze.steps.merging import MERGING_METHODS, Entry, Merge  # noqa: E402
from squeeze.steps.movement import Movement  # noqa: E402
from squeeze.steps.quantization import METHODS, Grouped, Quantize  # noqa: E402
from squeeze.steps.slimming import SLIMMING_METHODS, Slim  # noqa: E402
from squeeze.steps.sparsifying import SPARSIFYING_METHODS, Sparsify  # noqa: E402
from squeeze.steps.training import Train  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
PLAIN = {"dense": "any type as it is", "factored": "factors of linear layers, in any type"}
MARKS = {
    "training": ("<!-- Training: written by scripts/document_methods.py. -->", "<!-- End of the training methods. -->"),
    "distilling": (
        "<!-- Distillation: written by scripts/document_methods.py. -->",
        "<!-- End of the distilling methods. -->",
    ),
    "merging": ("<!-- Merging: written by scripts/document_methods.py. -->", "<!-- End of the merging methods. -->"),
    "zeroing": ("<!-- Zeroing: written by scripts/document_methods.py. -->", "<!-- End of the zeroing methods. -->"),
    "factoring": (
        "<!-- Factoring: written by scripts/document_methods.py. -->",
        "<!-- End of the factoring methods. -->",
    ),
    "slimming": ("<!-- Slimming: written by scripts/document_methods.py. -->", "<!-- End of the slimming methods. -->"),
    "methods": ("<!-- Methods: written by scripts/document_methods.py. -->", "<!-- End of the methods. -->"),
    "formats": ("<!-- Formats: written by scripts/document_methods.py. -->", "<!-- End of the formats. -->"),
}


def page() -> str:
    """The page as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    made_of = {
        "methods": _methods(),
        "training": _training(),
        "distilling": _distilling(),
        "merging": _merging(),
        "zeroing": _zeroing(),
        "factoring": _factoring(),
        "slimming": _slimming(),
        "formats": _formats(),
    }
    for name, made in made_of.items():
        begin, end = MARKS[name]
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


def _methods() -> str:
    parts = [
        "Every method takes:\n\n" + _table(Quantize, ()),
        "Methods that round to integer codes ("
        + _listed(one for one in METHODS if issubclass(one, Grouped))
        + ") take:\n\n"
        + _table(Grouped, Quantize.model_fields),
    ]
    for method in METHODS:
        base = Grouped if issubclass(method, Grouped) else Quantize
        usual = method.model_construct(method=_name(method))
        own = _table(method, base.model_fields)
        needs = "Needs calibration text." if usual.needs_calibration else "Looks at no data."
        held = ", ".join(f"`{name}`" for name in holders(usual.scheme()))
        about = f"{inspect.getdoc(method)}\n\n{needs} By default it is held by {held or 'no format'}."
        parts.append("\n\n".join(filter(None, (f"### {_name(method)}", about, own))))
    return "\n\n".join(parts)


def _training() -> str:
    parts = ["Every method takes:\n\n" + _table(Train, ())]
    for method in TRAINING_METHODS:
        about = f"### {_name(method)}\n\n{inspect.getdoc(method)}"
        parts.append("\n\n".join(filter(None, (about, _table(method, Train.model_fields)))))
    return "\n\n".join(parts)


def _distilling() -> str:
    parts = [
        "Every method takes what those of finetuning share, and:\n\n" + _table(Distill, Train.model_fields),
        "A student is named as:\n\n" + _table(Student, ()),
    ]
    for method in DISTILLING_METHODS:
        about = f"### {_name(method)}\n\n{inspect.getdoc(method)}"
        parts.append("\n\n".join(filter(None, (about, _table(method, Distill.model_fields)))))
    return "\n\n".join(parts)


def _merging() -> str:
    parts = ["Every method takes:\n\n" + _table(Merge, ()), "An entry of `models` has:\n\n" + _table(Entry, ())]
    for method in MERGING_METHODS:
        about = f"### {_name(method)}\n\n{inspect.getdoc(method)}"
        parts.append("\n\n".join(filter(None, (about, _table(method, Merge.model_fields)))))
    return "\n\n".join(parts)


def _zeroing() -> str:
    parts = ["Every method takes:\n\n" + _table(Sparsify, ())]
    for method in SPARSIFYING_METHODS:
        about = f"### {_name(method)}\n\n{inspect.getdoc(method)}"
        parts.append("\n\n".join(filter(None, (about, _table(method, Sparsify.model_fields)))))
    shared = {*Movement.model_fields} - {*Movement.__annotations__} | {*Sparsify.model_fields}
    about = f"### {_name(Movement)}\n\n{inspect.getdoc(Movement)} It takes what every method of finetuning takes, too."
    return "\n\n".join((*parts, about, _table(Movement, shared)))


def _factoring() -> str:
    return "\n\n".join((f"### {_name(SVD)}", str(inspect.getdoc(SVD)), _table(SVD, ())))


def _slimming() -> str:
    parts = ["Every method takes:\n\n" + _table(Slim, ())]
    for method in SLIMMING_METHODS:
        about = f"### {_name(method)}\n\n{inspect.getdoc(method)}"
        parts.append("\n\n".join(filter(None, (about, _table(method, Slim.model_fields)))))
    return "\n\n".join(parts)


def _formats() -> str:
    rows = [
        f"| `{name}` | {_held(capacity) or 'what was learned, without the model'} | {', '.join(capacity.consumers)} |"
        for name, capacity in CAPACITIES.items()
    ]
    return "\n".join(["| format | holds | who loads it |", "|---|---|---|", *rows])


def _held(capacity: Capacity) -> str:
    told = []
    for held in capacity.held:
        bits = "" if held.element in {"float16", "bfloat16", *PLAIN} else f", {_numbers(held.bits)} bits"
        groups = (
            "" if held.element in {"float16", "bfloat16", "ggml", *PLAIN} else f", groups {_numbers(held.group_sizes)}"
        )
        zero = ", zero points" if held.asymmetric else ""
        rounded = [one for one in held.activations if one]
        activations = f", activations {' or '.join(rounded)}" if rounded else ""
        element = PLAIN.get(held.element, held.element)
        told.append(f"{element}{bits}{groups}{zero}{activations}")
    return "; ".join(told)


def _table(method: type[BaseModel], shared: Iterable[str]) -> str:
    fields = {name: field for name, field in method.model_fields.items() if name not in {"kind", "method", *shared}}
    if not fields:
        return ""
    rows = [
        f"| `{name}` | {type_name(field.annotation)}{_bounds(field)} | {_default(field)} | {_cell(field)} |"
        for name, field in fields.items()
    ]
    return "\n".join(["| parameter | takes | default | |", "|---|---|---|---|", *rows])


def _bounds(field: FieldInfo) -> str:
    """What pydantic keeps as objects with one of `ge`, `gt`, `le`, `lt`."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    told = [
        f"{sign} {getattr(one, word):,g}"
        for one in field.metadata
        for word, sign in signs.items()
        if hasattr(one, word)
    ]
    return f", {', '.join(told)}" if told else ""


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return "none" if default in (None, ()) else str(default).lower() if isinstance(default, bool) else str(default)


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _numbers(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _listed(methods: Iterable[type[Quantize]]) -> str:
    return ", ".join(f"`{_name(one)}`" for one in methods)


def _name(method: Method) -> str:
    return tag_of(method).split(".")[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
