"""The contract, `docs/openapi.json`: `python -m api.openapi` writes it, `--check` tells whether it is up to date."""

import json
import sys
from pathlib import Path

from api.app import create_app
from jobs.settings import Settings

SNAPSHOT = Path(__file__).parent.parent / "docs" / "openapi.json"


def text() -> str:
    """The snapshot as it should be."""
    return json.dumps(create_app(Settings.from_environment({})).openapi(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        current = SNAPSHOT.exists() and SNAPSHOT.read_text() == text()
        if not current:
            sys.stderr.write("docs/openapi.json is out of date: run `python -m api.openapi` and commit it\n")
        return 0 if current else 1
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
