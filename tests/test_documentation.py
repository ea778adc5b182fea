"""What the documents say agrees with the code."""

import re
import tomllib
from pathlib import Path

import pytest

from scripts import document_methods, document_report
from squeeze.shapes.architectures import ARCHITECTURES
from squeeze.specs.formats import CAPACITIES
from squeeze.steps.every import STEPS, tag_of

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_page_of_the_report_is_the_one_that_its_schema_makes() -> None:
    assert document_report.PAGE.read_text() == document_report.page(), "run python scripts/document_report.py"


def test_the_catalogue_of_methods_is_the_one_that_their_classes_make() -> None:
    assert document_methods.PAGE.read_text() == document_methods.page(), "run python scripts/document_methods.py"


def test_every_method_parameter_format_and_architecture_is_in_the_catalogue() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in STEPS:
        assert f"### {tag_of(method).split('.')[1]}" in page
        for name in method.model_fields.keys() - {"kind", "method"}:
            assert f"`{name}`" in page
    for name, capacity in CAPACITIES.items():
        assert f"`{name}`" in page
        assert all(consumer in page.lower() for consumer in capacity.consumers)
    letters = re.sub(r"[^a-z0-9]", "", page.lower())
    for architecture in ARCHITECTURES:
        assert re.sub(r"[^a-z0-9]", "", architecture) in letters


def test_every_runtime_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "decisions" / "dependencies.md").read_text()
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["api"], *extras["worker"], *extras["deepspeed"]]:
        name = re.split(r"[\[<>=]", requirement)[0]
        assert name == project["name"] or f"| {name} |" in page


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert f"]({page.name})" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert target.startswith(("https://", "http://")) or (page.parent / target).exists(), target


def test_every_target_that_the_documents_name_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets, page
