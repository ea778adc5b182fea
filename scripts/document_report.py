"""Writes docs/report.md from the schema in `squeeze/reports/report.py`: `python scripts/document_report.py`."""

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from squeeze.reports import report  # noqa: E402
from squeeze.reports.parts import Part  # noqa: E402

PAGE = ROOT / "docs" / "report.md"


def page() -> str:
    """The page as it should be."""
    opening = (inspect.getdoc(report) or "").split("\n\n", 1)[1]
    sections = "\n\n".join(_section(cls) for cls in _within(report.Report, {}))
    return (
        "# report.json\n\n<!-- Written by scripts/document_report.py from squeeze/report*.py; change it there. -->\n\n"
        f"`GET /v1/jobs/{{id}}/report`, `squeeze report JOB --json`, `client.jobs.report(job_id)`.\n{opening}\n"
        "A field that is added later does not change `schema_version`; one that changes its meaning or goes does.\n\n"
        f"{sections}\n"
    )


def _within(annotation: Any, found: dict[type[Part], None]) -> dict[type[Part], None]:
    """The parts that a type is made of, in the order in which they are met."""
    if inspect.isclass(annotation) and issubclass(annotation, Part) and annotation not in found:
        found[annotation] = None
        for field in annotation.model_fields.values():
            _within(field.annotation, found)
    for inner in get_args(annotation):
        _within(inner, found)
    return found


def _section(cls: type[Part]) -> str:
    about = inspect.cleandoc(cls.__doc__) + "\n\n" if cls.__doc__ and cls.__doc__ != Part.__doc__ else ""
    rows = [
        f"| `{name}` | {type_name(field.annotation)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        for name, field in cls.model_fields.items()
    ]
    return "\n".join([f"## {cls.__name__}\n", f"{about}| field | type | meaning |\n|---|---|---|", *rows])


def type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" if isinstance(value, str) else str(value) for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(one) for one in inner)
    if origin in (list, tuple):
        return f"list of {type_name(inner[0])}"
    if origin is dict:
        return f"object of {type_name(inner[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, Part):
        return f"[{annotation.__name__}](#{re.sub('[^a-z]', '', annotation.__name__.lower())})"
    return {types.NoneType: "null", Any: "anything"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    PAGE.write_text(page())
