"""The deploy files, read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"

# ${NAME}, ${NAME:-default}, ${NAME:?message}; $${…} is for the container's shell.
_VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::?([-?+])([^}]*))?\}")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def variables() -> list[tuple[str, str, str]]:
    """Name, operator and what follows it, of each variable that the compose file takes from its environment."""
    return _VARIABLE.findall(COMPOSE.read_text())


def filled_in(text: str, environ: dict[str, str]) -> str:
    """A value of the compose file with its variables replaced, as compose does it."""

    def value(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        return environ.get(name) or (rest if operator == "-" else "")

    return _VARIABLE.sub(value, text)


def instructions() -> Iterator[tuple[str, str, str]]:
    """Stage, instruction and arguments of each line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stage = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = arguments.split()[-1]
        yield stage, instruction, " ".join(arguments.split())
