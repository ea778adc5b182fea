"""Writes docs/report.md from the schema in `squeeze/report.py`: `python scripts/document_report.py`."""

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from squeeze import report  # noqa: E402

PAGE = ROOT / "docs" / "report.md"


def page() -> str:
    """The page as it should be."""
    parts = [cls for _, cls in inspect.getmembers(report, inspect.isclass) if issubclass(cls, report.Part)]
    in_order = sorted(parts, key=lambda cls: inspect.getsourcelines(cls)[1])
    told: list[type[report.Part]] = [
        report.Report,
        *(cls for cls in in_order if cls not in (report.Part, report.Report)),
    ]
    opening = (inspect.getdoc(report) or "").split("\n\n", 1)[1]
    sections = "\n\n".join(_section(cls) for cls in told)
    return (
        "# report.json\n\n<!-- Written by scripts/document_report.py from squeeze/report.py; change it there. -->\n\n"
        f"`GET /v1/jobs/{{id}}/report`, `squeeze report JOB --json`, `client.jobs.report(job_id)`.\n{opening}\n"
        "A field that is added later does not change `schema_version`; one that changes its meaning or goes does.\n\n"
        f"{sections}\n"
    )


def _section(cls: type[report.Part]) -> str:
    about = inspect.cleandoc(cls.__doc__) + "\n\n" if cls.__doc__ and cls.__doc__ != report.Part.__doc__ else ""
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
    if inspect.isclass(annotation) and issubclass(annotation, report.Part):
        return f"[{annotation.__name__}](#{re.sub('[^a-z]', '', annotation.__name__.lower())})"
    return {types.NoneType: "null", Any: "anything"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    PAGE.write_text(page())
