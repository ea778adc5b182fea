"""docs/operations.md names what there is."""

import re

from jobs.settings import VARIABLES, Settings
from tests.deploy.files import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()
ROWS = re.findall(r"^\| `(SQUEEZE_\w+)` \| ([^|]+) \|", TEXT, flags=re.MULTILINE)


def test_every_setting_stands_in_the_table_once_and_no_other() -> None:
    assert sorted(name for name, _ in ROWS) == sorted(VARIABLES)


def test_the_defaults_in_the_table_are_those_of_the_service() -> None:
    settings = Settings.from_environment({})
    for name, told in ROWS:
        value = getattr(
            settings, "worker_device" if name == "SQUEEZE_DEVICE" else name.removeprefix("SQUEEZE_").lower()
        )
        if name == "SQUEEZE_DATA":
            assert told == "`./.squeeze`"
        elif value in (None, ()):
            assert told == "none"
        elif name.endswith("_URL"):
            assert told == f"`{value.replace(str(settings.data), '…')}` in the data directory".replace("://…", ":///…")
        else:
            assert told.split()[0] == f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_every_setting_that_the_text_names_exists() -> None:
    of_the_client = {"SQUEEZE_URL", "SQUEEZE_API_KEY"}
    assert set(re.findall(r"SQUEEZE_[A-Z_]+", TEXT)) <= {*VARIABLES, *of_the_client}


def test_every_heading_of_the_contents_exists() -> None:
    headings = re.findall(r"^(#+) (.+)", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")): level for level, heading in headings}
    linked = set(re.findall(r"\]\(#([\w-]+)\)", TEXT))
    assert {anchor for anchor, level in anchors.items() if level == "##"} <= linked <= anchors.keys()
