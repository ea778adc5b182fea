"""Kills a job at a random block, again and again, and checks what is left: `make test-kills`.

    python scripts/kills.py [--kills 10] [--methods gptq awq autoround]

One job runs undisturbed. Another one of the same recipe is killed (SIGKILL) at a random moment of a random block,
started again, and killed again, as often as asked. It must go on each time with at most one block lost, and end with
the very files of the first.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory import inputs_of, make  # noqa: E402

BLOCKS, WIDTH = 16, 256
STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 4},
    "gptq": {"method": "gptq", "bits": 4},
    "awq": {"method": "awq", "bits": 4},
    "autoround": {"method": "autoround", "bits": 4, "iterations": 8},
    "smoothquant": {"method": "smoothquant"},
    "kquant": {"method": "kquant"},
    "magnitude": {"kind": "prune", "method": "magnitude"},
    "wanda": {"kind": "prune", "method": "wanda"},
    "sparsegpt": {"kind": "prune", "method": "sparsegpt", "pattern": "2:4"},
    "svd": {"kind": "prune", "method": "svd", "params_target": 0.75},
    "depth": {"kind": "prune", "method": "depth", "blocks": 12},
    "width": {"kind": "prune", "method": "width", "params_target": 0.75},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "autoround"], choices=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Path(options.work[0]), Path(options.work[1]), json.loads(options.work[2]))
        return
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make(model, BLOCKS, WIDTH)
        for method in options.methods:
            torment(model, Path(folder) / method, STEPS[method], options.kills, dice)


def torment(model: Path, room: Path, step: dict[str, Any], kills: int, dice: random.Random) -> None:
    """Runs the job twice, once with `kills` deaths; raises SystemExit where something is not as it should be."""
    whole = Attempt(model, room / "whole", step)
    whole.watch()
    expected = digests(room / "whole")
    lost: list[int] = []
    for number in range(kills):
        done = finished(room / "killed")
        # So that there is something left to kill: somewhere in the next part of the blocks, part of a block later.
        victim = dice.randrange(done, min(BLOCKS - 1, done + 1 + (BLOCKS - 1 - done) // (kills - number)) + 1)
        attempt = Attempt(model, room / "killed", step)
        attempt.watch(until=victim, delay=dice.random() * whole.seconds_a_block)
        lost.append(attempt.seen - finished(room / "killed"))
        print(
            f"  {step['method']}: killed {number + 1} of {kills} after block {attempt.seen}, {lost[-1]} lost",
            flush=True,
        )
    last = Attempt(model, room / "killed", step)
    last.watch()
    if max(lost) > 1:
        raise SystemExit(f"{step['method']}: {max(lost)} blocks were lost to one kill")
    if digests(room / "killed") != expected:
        raise SystemExit(f"{step['method']}: the files differ from those of an undisturbed job")
    print(f"{step['method']}: {kills} kills, at most {max(lost)} block lost, the files are the same", flush=True)


class Attempt:
    """One process that runs the job. seen: blocks that it said were done."""

    def __init__(self, model: Path, room: Path, step: dict[str, Any]) -> None:
        room.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--work", str(model), str(room), json.dumps(step)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.seen = 0
        self.seconds_a_block = 0.0

    def watch(self, until: int | None = None, delay: float = 0.0) -> None:
        """To the end; or until a block is reached, when, `delay` seconds into it, the process is killed."""
        assert self.process.stdout is not None
        began = time.monotonic()
        for line in self.process.stdout:
            kind, _, number = line.strip().partition(" ")
            if kind not in {"start", "block"}:
                continue
            self.seen = int(number)
            if kind == "block":
                self.seconds_a_block = (time.monotonic() - began) / BLOCKS
            else:
                began = time.monotonic()
            if until is not None and self.seen >= until:
                time.sleep(delay)
                self.process.kill()
                self.process.wait()
                # What it said between the decision and its death.
                said = [one.split() for one in self.process.stdout if one.startswith("block ")]
                self.seen = max([self.seen, *(int(one[1]) for one in said)])
                return
        if self.process.wait():
            raise SystemExit(f"the job ended with status {self.process.returncode}")


def finished(room: Path) -> int:
    """Blocks that the next attempt will not do again."""
    snapshots = sorted((room / "work").rglob("snapshot-*[0-9]"))
    return int(snapshots[-1].name.removeprefix("snapshot-")) if snapshots else 0


def digests(room: Path) -> dict[str, str]:
    files = sorted(path for path in (room / "out").rglob("*") if path.is_file())
    kept = [path for path in files if path.name not in {"report.json", "README.md"}]  # they tell of times
    return {path.relative_to(room).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def work(model: Path, room: Path, step: dict[str, Any]) -> None:
    """The whole pipeline, in this process, saying on stdout which blocks are done."""
    import torch

    from models.pipeline import run
    from models.progress import Silent
    from squeeze.specs.job_spec import JobSpec

    class Says(Silent):
        watched = False

        def stage(self, stage: Any) -> None:
            self.watched = stage == ("calibrating" if step["method"] in ("depth", "width") else "compressing")
            if self.watched:
                print(f"start {finished(room)}", flush=True)

        def advance(self, done: int, total: int, unit: str) -> None:  # noqa: ARG002
            if self.watched and unit == "blocks":
                print(f"block {done}", flush=True)

    torch.set_num_threads(1)
    asked = {
        "model": "random",
        "steps": [{"kind": "quantize"} | step],
        "data": {"samples": 16, "sequence_length": 128},
        "evaluation": {"samples": 4},
    }
    shutil.rmtree(room / "out", ignore_errors=True)  # as workers do
    run(inputs_of(JobSpec.model_validate(asked), model, room), Says())


if __name__ == "__main__":
    main()
