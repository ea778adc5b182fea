"""A job's report as one HTML page that loads nothing else."""

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from squeeze.reports.parts import Quality
from squeeze.reports.report import Block, Layer, Report
from squeeze.reports.words import size_text, step_text

_HERE = Path(__file__).parent
_CSS = (_HERE / "report.css").read_text()
_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")

# Nothing may run or load; only this very style sheet applies.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_CSS.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Row:
    """One block as the table shows it; `width` of its bar in percent of the worst block's."""

    block: Block
    worst: Layer | None
    width: int


@dataclass(frozen=True)
class Chart:
    """Losses by step as places on a canvas of 600 × 180. name: in words. line: as SVG has it. dots: of looks at
    held-out examples.
    """

    name: str
    line: str
    dots: list[tuple[float, float]]
    lowest: float
    highest: float


def page(job_id: str, report: Report) -> str:
    """The whole page. Every value is escaped: names and texts come from models and users."""
    # The style sheet is ours, and its hash is in the policy, so it goes in as it is.
    return _TEMPLATE.render(job_id=job_id, report=report, rows=_rows(report), charts=_charts(report), css=Markup(_CSS))  # noqa: S704


def _rows(report: Report) -> list[Row]:
    largest = max((block.relative_error or 0.0 for block in report.blocks), default=0.0)
    return [
        Row(
            block=block,
            worst=max(block.layers, key=lambda layer: layer.relative_error, default=None),
            width=round(100 * (block.relative_error or 0.0) / largest) if largest > 0 else 0,
        )
        for block in report.blocks
    ]


def _charts(report: Report) -> list[Chart]:
    """One, or two where what is learned from is another measure than what is looked at."""
    if report.training is None:
        return []
    steps = [(one.step, one.loss) for one in report.training.curve]
    looks = [(one.step, one.loss) for one in report.training.held_out]
    last = max(report.training.steps, 1)
    if report.training.distillation is None:
        return [_chart("Loss by step", steps, looks, last)]
    return [_chart("Objective by step", steps, [], last), _chart("Held-out loss by step", looks, looks, last)]


def _chart(name: str, line: list[tuple[int, float]], dots: list[tuple[int, float]], last: int) -> Chart:
    losses = [loss for _, loss in (*line, *dots)]
    lowest, highest = min(losses), max(losses)

    def place(step: int, loss: float) -> tuple[float, float]:
        height = (loss - lowest) / (highest - lowest) if highest > lowest else 0.0
        return round(60 + 530 * step / last, 1), round(150 - 140 * height, 1)

    joined = " ".join(f"{x},{y}" for x, y in (place(*one) for one in line))
    return Chart(name, joined, [place(*one) for one in dots], lowest, highest)


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}g}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _change(quality: Quality) -> str:
    before, after = quality.perplexity_before, quality.perplexity_after
    return "" if not before or after is None else f", {100 * (after / before - 1):+.2f} %"


_environment = Environment(
    loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_environment.filters.update(
    bytes=_bytes, number=_number, count=_count, percent=_percent, change=_change, recipe=step_text, smaller=size_text
)
_TEMPLATE = _environment.get_template("report.html.j2")
