"""Makes requirements/*.lock from pyproject.toml: `python scripts/lock.py [--upgrade]`, in an environment with `dev`.

Versions that are locked already stay, unless `--upgrade` is given or pyproject.toml rules them out.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
EXTRAS = ("api", "worker", "dev")

HEADER = "# Made by scripts/lock.py from pyproject.toml, extra `{extra}`, for Python {python} on Linux. Do not edit.\n"
WITH_TORCH = """\
# torch has no local version, and brings what it needs of CUDA by itself: which packages depends on its build, so none
# of them is locked. Without a GPU, first: pip install torch==X.Y.Z --index-url https://download.pytorch.org/whl/cpu
# gptqmodel is built against the torch that is there: install requirements/gptqmodel.txt after this file.
"""
GPTQMODEL = """\
# Made by scripts/lock.py. After worker.lock or dev.lock, which hold what it needs:
#   pip install --no-build-isolation --no-deps -r requirements/gptqmodel.txt
"""

_OF_TORCH = re.compile(r"(nvidia|cuda|triton)\b")
_ELSEWHERE = re.compile(r"(gptqmodel|squeeze-llm)\b", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    upgrade = parser.parse_args().upgrade
    FOLDER.mkdir(exist_ok=True)
    for extra in EXTRAS:
        entries = _entries(_compiled(extra, upgrade=upgrade))
        gptqmodel = [entry.splitlines()[0] for entry in entries if entry.lower().startswith("gptqmodel==")]
        if gptqmodel:
            (FOLDER / "gptqmodel.txt").write_text(f"{GPTQMODEL}{gptqmodel[0]}\n")
        kept = [entry for entry in entries if not _OF_TORCH.match(entry) and not _ELSEWHERE.match(entry)]
        header = HEADER.format(extra=extra, python=f"{sys.version_info.major}.{sys.version_info.minor}")
        notes = WITH_TORCH if any(entry.startswith("torch==") for entry in kept) else ""
        (FOLDER / f"{extra}.lock").write_text(header + notes + "".join(kept))
    return 0


def _compiled(extra: str, *, upgrade: bool) -> str:
    """What pip-compile makes of an extra, starting from the lock that is there."""
    lock = FOLDER / f"{extra}.lock"
    work = FOLDER / f".{extra}.compiling"
    seeds = [file.read_text() for file in (lock, FOLDER / "gptqmodel.txt") if file.exists()]
    work.write_text("".join(seeds))
    command = [
        sys.executable,
        "-m",
        "piptools",
        "compile",
        "--quiet",
        "--extra",
        extra,
        "--strip-extras",
        "--no-header",
    ]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--allow-unsafe"]
    command += ["--no-build-isolation", "--output-file", str(work), str(ROOT / "pyproject.toml")]
    try:
        subprocess.run([*command, "--upgrade"] if upgrade else command, check=True, cwd=ROOT)
        return work.read_text()
    finally:
        work.unlink(missing_ok=True)


def _entries(compiled: str) -> list[str]:
    """One text per package: its pin, and the comments of who wants it."""
    entries: list[str] = []
    for line in compiled.splitlines(keepends=True):
        if line[:1].isalnum():
            entries.append(re.sub(r"^(torch==[\d.]+)\+\w+", r"\1", line))
        elif line.startswith("    #") and entries:
            entries[-1] += re.sub(r" \(\S*pyproject\.toml\)", "", line)
    return entries


if __name__ == "__main__":
    sys.exit(main())
