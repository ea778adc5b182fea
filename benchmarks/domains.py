"""What weighing domains by their excess loss does to a pruned model that is taught by the original.

    python benchmarks/domains.py [--prose DIR --json DIR] [--model DIR] [--target 0.75] [--steps 60] [--every 10]
        [--rate 0.001] [--length 512] [--seeds 0 1] [--records 200 200 100]

The text has three domains. By default all are of what the bundled model learned, the standard library: its source, the
manual that comes with it (English), and its tables of encodings. With `--prose` and `--json` the second and the third
are the `*.txt` of a directory and the `*.json` below another, which that model never saw. The model is made narrower
once; then the original teaches it on all of the text, with `domain_column` and without, and each is measured on the
same held-out records, domain by domain, against the original. Prints Markdown.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.job import Inputs
from models.progress import Silent
from models.prune.slimming import smaller
from models.resources import Clock
from models.texts.generic import standard_library
from models.train.job import trained
from squeeze.reports.training import Training
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train
from squeeze.texts.documents import passages

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
CHARACTERS = 1500  # of a record
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--target", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--records", type=int, nargs=3, default=[200, 200, 100], help="of the domains")
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        bench = Bench(options, Path(room))
        pruned = bench.pruned()
        bench.show("pruned, not trained", pruned, header=True)
        for seed in options.seeds:
            for name, column in (("as they come", None), ("weighed", "domain")):
                made, told = bench.taught(pruned, seed, column)
                bench.show(f"{name}, seed {seed}", made)
                for look in told.held_out if column else ():
                    weights = ", ".join(f"{name} {one:.3f}" for name, one in (look.domain_weights or {}).items())
                    print(f"  weights after {look.step} steps: {weights}", file=sys.stderr)


class Bench:
    def __init__(self, options: Any, room: Path) -> None:
        self._options, self._room, self._made = options, room, 0
        texts = {"source": _modules(None), "manual": _modules("pydoc_data"), "tables": _modules("encodings")}
        if options.prose is not None and options.json is not None:
            files = {"prose": _files(options.prose, "*.txt"), "json": _files(options.json, "*.json")}
            texts = {"source": texts["source"]} | files
        rows = [
            {"text": text, "domain": name}
            for (name, some), count in zip(texts.items(), options.records, strict=True)
            for text in _drawn(some, count)
        ]
        self._text = room / "text.jsonl"
        self._text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def pruned(self) -> Path:
        spec = self._spec({"kind": "prune", "method": "width", "params_target": self._options.target})
        step = spec.steps[0]
        assert isinstance(step, Slim), "it was asked for"
        return smaller.slimmed(self._inputs(spec, self._options.model), step, Clock(), Silent()).whole

    def taught(self, pruned: Path, seed: int, column: str | None) -> tuple[Path, Training]:
        options, began = self._options, time.monotonic()
        step = {"kind": "distill", "method": "logits", "student": {"model": "org/student"}, "steps": options.steps}
        step |= {"learning_rate": options.rate, "batch_size": BATCH, "micro_batch_size": 4}
        made = self._run(step | {"evaluate_every": options.every, "domain_column": column}, pruned, seed)
        print(f"{column}, seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return made

    def show(self, name: str, model: Path, *, header: bool = False) -> None:
        """Losses as a training would find them before its first step."""
        step = {"kind": "distill", "method": "logits", "student": {"model": "org/student"}, "top_k": "all"}
        _, told = self._run(
            step | {"steps": 1, "batch_size": 1, "evaluate_every": 1, "domain_column": "domain"}, model, 0
        )
        if header:
            print("| | " + " | ".join(f"{one.name}, excess" for one in told.domains) + " | widest apart | mean loss |")
            print("|---" * (len(told.domains) + 3) + "|")
            cells = " | ".join(f"{one.loss_reference:.4f}, 0" for one in told.domains)
            whole = sum(one.loss_reference * one.measured_tokens for one in told.domains) / told.measured_tokens
            print(f"| the original | {cells} | 0 | {whole:.4f} |")
            tokens = ", ".join(f"{one.name} {one.tokens:,} ({one.measured_tokens:,})" for one in told.domains)
            print(f"tokens to learn (measured): {tokens}", file=sys.stderr)
        excess = [one.loss_before - one.loss_reference for one in told.domains]
        cells = " | ".join(
            f"{one.loss_before:.4f}, {more:+.4f}" for one, more in zip(told.domains, excess, strict=True)
        )
        print(f"| {name} | {cells} | {max(excess) - min(excess):.4f} | {told.loss_before:.4f} |", flush=True)

    def _run(self, step: dict[str, Any], student: Path, seed: int) -> tuple[Path, Training]:
        spec = self._spec(step, seed)
        training = spec.steps[0]
        assert isinstance(training, Train), "it was asked for"
        inputs = replace(self._inputs(spec, self._options.model), student=student, student_name="the pruned model")
        whole = inputs.work / "whole"
        return whole, trained(inputs, training, inputs.work / "adapter", whole, Clock(), Silent()).training

    def _spec(self, step: dict[str, Any], seed: int = 0) -> JobSpec:
        data = {"source": "file-abcdefgh", "samples": 64, "sequence_length": self._options.length}
        return JobSpec.model_validate(
            {"model": "org/model", "steps": [step], "data": data, "evaluation": {"samples": 128}, "seed": seed}
        )

    def _inputs(self, spec: JobSpec, model: Path) -> Inputs:
        self._made += 1
        room = self._room / str(self._made)
        (room / "work").mkdir(parents=True)
        return Inputs(
            spec=spec,
            model=model,
            model_name="org/model",
            revision="0",
            calibration_text=self._text,
            work=room / "work",
            out=room / "out",
            device="cpu",
            job_id="job-x",
        )


def _modules(package: str | None) -> Iterator[str]:
    """Of the standard library: of a package, or of all but those that are domains of their own."""
    for name, text in standard_library("train"):
        own = name.partition(".")[0]
        if own == package or (package is None and own not in ("pydoc_data", "encodings")):
            yield text


def _files(directory: Path, pattern: str) -> Iterator[str]:
    for path in sorted(directory.rglob(pattern)):
        yield path.read_text(encoding="utf-8", errors="replace")


def _drawn(texts: Iterator[str], count: int) -> list[str]:
    """So many passages, from all over the texts."""
    found = [one for one in passages(texts, CHARACTERS) if len(one) > CHARACTERS // 4]
    return random.Random(0).sample(found, count)


if __name__ == "__main__":
    main()
