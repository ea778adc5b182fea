"""What calibration text is worth: divergence at 4, 3 and 2 bits against its source and the number of its samples.

    python benchmarks/calibration.py [--model DIR] [--text FILE --text-name NAME] [--draws 3] [--samples 8 32 128]

Every source's largest draw is taken once for each seed, and its first 8, 32 … sequences serve as the smaller ones. One
pass of the engine compresses (GPTQ, groups of 128 unless `--group-size`) and measures, on the held-out part of the
generic text and of FILE; no source sees either. Prints Markdown: medians, with the least and the most of the draws.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.files.checkpoint import open_model
from models.measuring.evaluation import measure
from models.progress import Silent
from models.streaming import engine
from models.streaming.frame import Frame
from models.texts.data import Windows, calibration_batches, evaluation_windows
from models.texts.material import read_tokenizer
from models.texts.self_text import sampled_text
from squeeze.steps.every import tag_of
from squeeze.steps.quantization import METHODS, Quantize

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
GENERIC = "generic text"
Figures = dict[tuple[str, int, str, int], list[float]]  # judged on, bits, source, samples: of each draw


@dataclass(frozen=True)
class Bench:
    """judged: held-out windows by the name of their text."""

    model: Path
    judged: dict[str, Windows]
    group_size: int

    def frame(self) -> Frame:
        source = open_model(self.model)
        return Frame(source, source.dtype, torch.device("cpu"))

    def divergences(self, method: str, bits: int, ids: Tensor | None) -> dict[str, float]:
        """Mean KL(original ‖ result) in nats on every held-out text. ids: calibration sequences (n, T)."""
        frame, step = self.frame(), step_of(method, bits, self.group_size)
        both = torch.cat([windows.ids for windows in self.judged.values()])
        text = next(iter(self.judged.values())).text
        joined = Windows(both, (1,) * len(both), both.shape[1], text)
        with tempfile.TemporaryDirectory() as work:
            done = engine.quantize(frame, step, ids, joined, Path(work), "", Silent())
            before, after = (torch.cat(list(one)) for one in (done.activations.original, done.activations.compressed))
        found, at = {}, 0
        for name, windows in self.judged.items():
            part = slice(at, at + len(windows.ids))
            found[name] = (
                measure(frame, windows, [before[part]], [after[part]], Silent()).quality.divergence_nats or 0.0
            )
            at = part.stop
        return found


def step_of(method: str, bits: int, group_size: int) -> Quantize:
    known = next(one for one in METHODS if tag_of(one) == f"quantize.{method}")
    return known.model_validate({"kind": "quantize", "method": method, "bits": bits, "group_size": group_size})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, help="another text to calibrate and to judge on")
    parser.add_argument("--text-name", default="the given text", help="what the tables call it")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="of each held-out text")
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = read_tokenizer(options.model)
    texts: dict[str, Path | None] = {GENERIC: None}
    if options.text:
        texts[options.text_name] = options.text
    judged = {
        name: evaluation_windows(tokenizer, path, name, True, options.windows, options.length, None)
        for name, path in texts.items()
    }
    bench = Bench(options.model, judged, options.group_size)
    plain = {bits: bench.divergences("rtn", bits, None) for bits in options.bits}
    figures: Figures = {}
    for seed in range(options.draws):
        drawn = {
            name: calibration_batches(tokenizer, path, name, max(options.samples), options.length, seed).ids
            for name, path in texts.items()
        }
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            drawn["self"], origin = sampled_text(
                bench.frame(), tokenizer, max(options.samples), options.length, seed, Path(work), Silent()
            )
        note(f"seed {seed}: {drawn['self'].numel():,} tokens {origin}, {time.monotonic() - began:.0f} s")
        for source, ids in drawn.items():
            if len(ids) < max(options.samples):
                sys.exit(f"{source} has no more than {len(ids)} sequences of {options.length} tokens")
            for bits, samples in product(options.bits, options.samples):
                found = bench.divergences("gptq", bits, ids[:samples])
                for name, value in found.items():
                    figures.setdefault((name, bits, source, samples), []).append(value)
                note(f"seed {seed}, {bits} bits, {source}, {samples} samples: {found}")
    for name, windows in judged.items():
        print(f"\nJudged on {name}, {windows.ids.numel():,} held-out tokens:\n")
        print_table(name, [*texts, "self"], options.bits, options.samples, plain, figures)


def print_table(
    judged: str,
    sources: list[str],
    all_bits: list[int],
    counts: list[int],
    plain: dict[int, dict[str, float]],
    figures: Figures,
) -> None:
    row("bits", "calibrated on", *(f"{count} sequences" for count in counts))
    row(*["---"] * (2 + len(counts)))
    for bits in all_bits:
        row(bits, "nothing (RTN)", *[f"{plain[bits][judged]:.5f}"] * len(counts))
        for source in sources:
            row(bits, source, *(spread(figures[judged, bits, source, count]) for count in counts))


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.5f} ({min(values):.5f} – {max(values):.5f})" if len(values) > 1 else f"{middle:.5f}"


if __name__ == "__main__":
    main()
