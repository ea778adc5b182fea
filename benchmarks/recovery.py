"""What training wins back of a pruned model, against the same shape trained from nothing, at equal training tokens.

    python benchmarks/recovery.py [--model DIR] [--target 0.75] [--steps 200] [--batch 8] [--length 256]
        [--seeds 0 1 2] [--rates 0.0005 0.001] [--scratch-rates 0.001 0.002 0.004] [--methods depth width svd]
        [--alpha 0.9] [--teach-nothing]

All arms learn from the generic text, the same of it in the same order for a seed, and are measured on the same held-out
part. There are: a pruned model as it is; the same taught by the original, which of `svd` are its factors; its shape
with weights drawn at random, learning from the text alone, or taught by the original (factors have no shape of their
own). Learning rates are the best of several by the first seed, for each by itself. Prints Markdown.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.formats.directory import linked
from models.job import Inputs
from models.pipeline import run
from models.progress import Silent
from models.prune.factors.handed import HandedFactors
from models.texts.data import generic_passages
from squeeze.reports.report import Report
from squeeze.reports.training import Training
from squeeze.specs.job_spec import JobSpec

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
PRUNED: dict[str, dict[str, Any]] = {
    "depth": {"method": "depth"},
    "width": {"method": "width", "importance": "gradient"},
    "svd": {"method": "svd"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--target", type=float, default=0.75)
    parser.add_argument("--methods", nargs="+", default=["depth", "width", "svd"], choices=PRUNED)
    parser.add_argument("--taught", nargs="*", default=[*PRUNED], choices=PRUNED, help="of the methods")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--teach-nothing", action="store_true", help="the shapes drawn at random too, by the original")
    parser.add_argument("--alpha", type=float, default=0.9, help="share of the divergence in what is learned")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0005, 0.001, 0.002])
    parser.add_argument("--scratch-rates", type=float, nargs="+", default=[0.001, 0.002, 0.004])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        bench = Bench(options, room)
        print("| model | parameters | learning rate | held-out loss by seed | median | perplexity |")
        print("|---|---|---|---|---|---|")
        bench.show("the original", open_model(options.model).parameters, [bench.loss(options.model)])
        for method in options.methods:
            pruned = bench.pruned(method)
            bench.show(f"{method}, not trained", pruned.parameters, [bench.loss(pruned.model)])
            if method in options.taught:
                bench.race(f"{method}, distilled", pruned, options.rates, taught=True)
            if method in options.taught and pruned.factors is None:
                random = bench.drawn(pruned, method)
                bench.race(f"{method}'s shape from nothing", random, options.scratch_rates, taught=False)
                if options.teach_nothing:
                    bench.race(f"{method}'s shape from nothing, distilled", random, options.scratch_rates, taught=True)


@dataclass(frozen=True)
class Arm:
    """A model that learns, or not. factors: of its linears, where they were factored."""

    model: Path
    factors: HandedFactors | None = None

    @property
    def parameters(self) -> int:
        return open_model(self.model).parameters if self.factors is None else self.factors.told.parameters_after


class Bench:
    def __init__(self, options: Any, room: Path) -> None:
        self._options, self._room, self._number = options, room, 0
        text = room / "text.jsonl"
        tokens = options.steps * options.batch * options.length * 10 // 9  # a tenth is held out
        passages = generic_passages("train", 6 * tokens, options.length, 0)
        text.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8")
        self._text = text

    def loss(self, model: Path) -> float:
        """On the held-out text, of a model as it is: before the one step of a training that is worth nothing."""
        return self._trained(model, {"method": "full", "steps": 1, "learning_rate": 1e-9}, 0).loss_before

    def pruned(self, method: str) -> Arm:
        step = {"kind": "prune", "params_target": self._options.target} | PRUNED[method]
        report, out = self._job(self._options.model, [step], 0)
        factors = out.parents[1] / "work" / "prune"
        return Arm(out, None if report.factoring is None else HandedFactors(factors, report.factoring))

    def drawn(self, pruned: Arm, method: str) -> Arm:
        """The same shape with weights as the family draws them."""
        out = self._room / f"drawn-{method}"
        linked(pruned.model, out)
        for file in out.glob("model*.safetensors*"):
            file.unlink()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pruned.model), dtype=torch.float32)
        model.save_pretrained(out)
        assert open_model(out).parameters == pruned.parameters
        return Arm(out)

    def race(self, name: str, arm: Arm, rates: Sequence[float], *, taught: bool) -> None:
        """Of all seeds, with the rate that is best for the first."""
        seeds = self._options.seeds
        first = {rate: self._learned(name, arm, rate, seeds[0], taught=taught) for rate in rates}
        rate = min(first, key=first.__getitem__)
        losses = [first[rate], *(self._learned(name, arm, rate, seed, taught=taught) for seed in seeds[1:])]
        self.show(name, arm.parameters, losses, f"{rate:g} of {', '.join(f'{one:g}' for one in rates)}")

    def show(self, name: str, parameters: int, losses: Sequence[float], rate: str = "") -> None:
        middle = statistics.median(losses)
        each = ", ".join(f"{one:.4f}" for one in losses)
        perplexity = torch.tensor(middle).exp().item()
        print(
            f"| {name} | {parameters:,} | {rate} | {each} | {middle:.4f} | {perplexity:.2f} |",
            flush=True,
        )

    def _learned(self, name: str, arm: Arm, rate: float, seed: int, *, taught: bool) -> float:
        began, options = time.monotonic(), self._options
        step: dict[str, Any] = {"steps": options.steps, "batch_size": options.batch, "learning_rate": rate}
        if taught:
            step |= {"kind": "distill", "method": "logits", "student": {"model": "org/student"}, "alpha": options.alpha}
            told = self._trained(options.model, step, seed, student=arm)
        else:
            told = self._trained(arm.model, step | {"method": "full"}, seed)
        seconds = time.monotonic() - began
        print(f"{name}, seed {seed}, {rate:g}: {told.loss_after:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
        return told.loss_after

    def _trained(self, model: Path, step: Mapping[str, Any], seed: int, student: Arm | None = None) -> Training:
        report, _ = self._job(model, [{"kind": "finetune"} | step], seed, student)
        assert report.training is not None, "it trains"
        return report.training

    def _job(
        self, model: Path, steps: Sequence[Mapping[str, Any]], seed: int, student: Arm | None = None
    ) -> tuple[Report, Path]:
        """(report, model). Nothing is certified: what the files hold is measured here."""
        self._number += 1
        room = self._room / str(self._number)
        (room / "out").mkdir(parents=True)
        described = {"model": "org/model", "steps": steps, "seed": seed, "evaluation": {"samples": 64}}
        data = {"source": "file-abcdefgh", "sequence_length": self._options.length, "samples": 64}
        inputs = Inputs(
            spec=JobSpec.model_validate(described | {"data": data, "formats": ["safetensors"]}),
            model=model.resolve(),
            model_name="model",
            work=room / "work",
            out=room / "out",
            device="cpu",
            job_id="job",
            calibration_text=self._text,
            student=None if student is None else student.model,
            factors=None if student is None else student.factors,
            student_name=None if student is None else "student",
            goes_on=True,
            snapshot_seconds=1e9,
        )
        inputs.work.mkdir()
        outcome = run(inputs, Silent())
        return outcome.report, outcome.directories["safetensors"]


if __name__ == "__main__":
    main()
