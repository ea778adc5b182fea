"""Generic text that every installation has: the source of the running interpreter's standard library.

It is read from the interpreter, never copied into the repository. Modules are split into a `train` part (calibration,
training) and a `held_out` part (evaluation) by a hash of their names, so that the split is the same on every machine
and survives new Python releases.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

# Tests repeat themselves, wheels and third-party packages are not the standard library.
SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "lib2to3"}
)
HELD_OUT_SHARE = 10  # one module in ten


def split_of(module: str) -> Split:
    """The side of the split that a module (dotted name) is on."""
    digest = hashlib.sha256(module.encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0 else "train"


def standard_library(split: Split) -> Iterator[tuple[str, str]]:
    """(dotted module name, source text) of every module on one side of the split, in name order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or any(part.startswith("config-") for part in relative.parts):
            continue
        module = ".".join(relative.with_suffix("").parts)
        if split_of(module) != split:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield module, text
