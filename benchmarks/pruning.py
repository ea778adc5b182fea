"""What pruning costs and saves, before any training: perplexity, divergence, parameters, bytes, tokens a second.

    python benchmarks/pruning.py [--model DIR] [--samples 64] [--length 512] [--windows 32] [--draws 3]
        [--methods wanda depth …] [--llmcompressor PYTHON]

One pass of the engine prunes and measures, on the held-out part of the generic text; the result is written and read
back, so that zeros and bytes are those of the files. Every draw of calibration text is of another seed; `magnitude`
looks at none. A row with `then gptq` is that result quantized to 4 bits, its zeros kept, against the original; `gptq
that zeroes too` does both in one step. What has more to it than one pass runs as a job. Tokens a second are those of
the result over those of the original, the two measured in turn: of a prompt, and while writing. Prints Markdown:
medians over the draws. With the Python of an environment that has llm-compressor, its SparseGPT and Wanda prune on the
first draw too, and are measured in the same way.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.files.checkpoint import SourceModel, open_model
from models.formats import layout
from models.formats.directory import weight_bytes
from models.job import Inputs
from models.measuring import speed
from models.measuring.evaluation import measure
from models.pipeline import run
from models.progress import Silent
from models.prune.zeroing.counting import counted_codes, counted_zeros
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.teamwork import frames_of
from models.texts.data import Windows, calibration_batches, evaluation_windows
from models.texts.material import read_tokenizer
from squeeze.names import Format
from squeeze.reports.parts import Quality
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.every import tag_of
from squeeze.steps.quantization import GPTQ, RTN
from squeeze.steps.sparsifying import SPARSIFYING_METHODS, Sparsify

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
PEER = Path(__file__).with_name("peers") / "prune_with_llmcompressor.py"
TARGETS: list[dict[str, Any]] = [{"sparsity": 0.3}, {"sparsity": 0.5}, {"sparsity": 0.7}]
PATTERNS: list[dict[str, Any]] = [{"pattern": "4:8"}, {"pattern": "2:4"}]


# As steps of jobs.
JOBS: list[dict[str, Any]] = [
    {"method": method, "sparsity": sparsity, "distribution": "owl"}
    for sparsity in (0.5, 0.7)
    for method in ("wanda", "sparsegpt")
] + [
    {"method": method, "params_target": share} | more
    for share in (0.9, 0.75, 0.6)
    for method, more in (
        ("depth", {"importance": "influence"}),
        ("depth", {"importance": "perplexity"}),
        ("width", {"importance": "activation"}),
        ("width", {"importance": "gradient"}),
        ("svd", {}),
    )
]


@dataclass(frozen=True)
class Made:
    """faster: tokens a second over the original's, of a prompt and while writing; None: not measured."""

    quality: Quality
    bytes: int
    parameters: int
    nonzero: int
    zstd_bytes: int | None = None
    faster: tuple[float, float] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--draws", type=int, default=3)
    every = [tag_of(one).split(".")[1] for one in SPARSIFYING_METHODS] + [one["method"] for one in JOBS]
    parser.add_argument("--methods", nargs="+", default=list(dict.fromkeys(every)))
    parser.add_argument("--llmcompressor", type=Path, help="Python of an environment with it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    speed.PART_SECONDS = 0.5  # a block of so small a model takes a millisecond or two
    tokenizer, source = read_tokenizer(options.model), open_model(options.model)
    windows = evaluation_windows(tokenizer, None, None, True, options.windows, options.length, None)
    draws = [
        calibration_batches(tokenizer, None, None, options.samples, options.length, seed).ids
        for seed in range(options.draws)
    ]
    print(
        "| method | target | perplexity | divergence, nats | parameters | not zero | bytes | under zstd "
        "| prompt, times as fast | writing |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for wanted in TARGETS + PATTERNS:
        for method in SPARSIFYING_METHODS:
            name = tag_of(method).split(".")[1]
            if name not in options.methods:
                continue
            step = method.model_validate({"method": name} | wanted)
            rows = [_made(source, step, ids, windows) for ids in (draws if step.needs_calibration else draws[:1])]
            for number, told in enumerate((step.method, f"{step.method}, then gptq")):
                _print(told, _target(step), [row[number] for row in rows])
            if step.method == "sparsegpt":
                both = [_made_at_once(source, step, ids, windows) for ids in draws]
                _print("gptq that zeroes too", _target(step), both)
            if options.llmcompressor and step.needs_calibration:
                peer = _made_by_llmcompressor(options.llmcompressor, source, step, draws[0], windows)
                _print(f"llm-compressor's {step.method}", _target(step), [peer])
    for asked in JOBS:
        if asked["method"] in options.methods:
            rows = [_made_by_job(options, asked, seed) for seed in range(options.draws)]
            more = [str(value) for name, value in asked.items() if name in ("importance", "distribution")]
            share = asked.get("params_target") or asked["sparsity"]
            _print(", ".join([asked["method"], *more]), f"{share:.0%}", rows)


def _made(source: SourceModel, step: Sparsify, ids: Tensor, windows: Windows) -> tuple[Made, Made]:
    """Pruned; and quantized after it."""
    with tempfile.TemporaryDirectory() as room:
        pruned, rounded = Path(room) / "pruned", Path(room) / "rounded"
        done, quality = _compressed(source, step, ids, windows, Path(room) / "prune", pruned, "safetensors", None)
        zeros = counted_zeros(source, pruned, done.model.sites.values(), step)
        nonzero = source.parameters - zeros.zeros
        first = Made(
            quality,
            zeros.weight_bytes,
            source.parameters,
            nonzero,
            zeros.zstd_bytes,
            _faster(source, open_model(pruned), ids),
        )
        step_after, at = GPTQ(method="gptq"), Path(room) / "quantize"
        _, after = _compressed(open_model(pruned), step_after, ids, windows, at, rounded, "compressed-tensors", source)
        return first, Made(after, weight_bytes(rounded), source.parameters, nonzero)


def _made_at_once(source: SourceModel, step: Sparsify, ids: Tensor, windows: Windows) -> Made:
    """Zeroed and rounded by one step."""
    target = {"pattern": step.pattern} if step.pattern else {"sparsity": step.sparsity}
    with tempfile.TemporaryDirectory() as room:
        both, out = GPTQ.model_validate({"method": "gptq"} | target), Path(room) / "out"
        done, quality = _compressed(source, both, ids, windows, Path(room) / "work", out, "compressed-tensors", None)
        zeros = counted_codes(source, out, done.model)
        nonzero = source.parameters - zeros.zeros
        return Made(quality, zeros.weight_bytes, source.parameters, nonzero, zeros.zstd_bytes)


def _made_by_job(options: Any, asked: dict[str, Any], seed: int) -> Made:
    """Nothing is certified."""
    described = {"model": "org/model", "steps": [{"kind": "prune"} | asked], "formats": ["safetensors"], "seed": seed}
    data = {"samples": options.samples, "sequence_length": options.length}
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        (room / "out").mkdir()
        (room / "work").mkdir()
        inputs = Inputs(
            spec=JobSpec.model_validate(described | {"data": data, "evaluation": {"samples": options.windows}}),
            model=options.model.resolve(),
            model_name="model",
            work=room / "work",
            out=room / "out",
            device="cpu",
            job_id="job",
            goes_on=True,
        )
        outcome = run(inputs, Silent())
        report, result = outcome.report, open_model(outcome.directories["safetensors"])
        assert report.quality is not None, "it was asked for"
        slimming, zeros, factoring = report.slimming, report.sparsity, report.factoring
        before, after = (slimming.speed_before, slimming.speed_after) if slimming is not None else (None, None)
        if factoring is not None:  # as onnx holds it
            before, after = factoring.speed_before, factoring.speed_factored
            parameters = factoring.parameters_after
            faster = (after.prompt / before.prompt, after.writing / before.writing)
            return Made(report.quality, factoring.factor_bytes, parameters, parameters, faster=faster)
        return Made(
            report.quality,
            report.sizes[0].weight_bytes,
            result.parameters,
            result.parameters - (zeros.zeros if zeros is not None else 0),
            zeros.zstd_bytes if zeros is not None else None,
            (after.prompt / before.prompt, after.writing / before.writing) if before and after else None,
        )


def _faster(source: SourceModel, result: SourceModel, ids: Tensor) -> tuple[float, float]:
    frames = [Frame(one, one.dtype, torch.device("cpu")) for one in (source, result)]
    before, after = speed.speeds(frames, ids[0])
    return after.prompt / before.prompt, after.writing / before.writing


def _made_by_llmcompressor(python: Path, source: SourceModel, step: Sparsify, ids: Tensor, windows: Windows) -> Made:
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        save_file({"ids": ids}, room / "tokens.safetensors")
        job = {
            "model": str(source.path.resolve()),
            "tokens": str(room / "tokens.safetensors"),
            "out": str(room / "out"),
        }
        asked = {"method": step.method, "sparsity": step.sparsity, "pattern": step.pattern}
        (room / "job.json").write_text(json.dumps(job | asked))
        subprocess.run([str(python), str(PEER), str(room / "job.json")], check=True, stdout=sys.stderr)
        result, plain = open_model(room / "out"), RTN(method="rtn")
        frames = frames_of(result, plain, torch.device("cpu"), source)
        done = engine.quantize(
            frames.result, plain, None, windows, room / "work", "", Silent(), schemes={}, reference=frames.reference
        )
        streams = done.activations.original, done.activations.compressed
        quality = measure(frames.result, windows, *streams, Silent(), reference=frames.reference).quality
        sites = [site for n in range(frames.result.count) for site in frames.result.sites(n)]
        zeros = counted_zeros(source, room / "out", sites, step)
        nonzero = source.parameters - zeros.zeros
        return Made(quality, zeros.weight_bytes, source.parameters, nonzero, zeros.zstd_bytes)


def _compressed(
    source: SourceModel,
    step: Compress,
    ids: Tensor,
    windows: Windows,
    work: Path,
    out: Path,
    form: Format,
    original: SourceModel | None,
) -> tuple[engine.Quantization, Quality]:
    frames = frames_of(source, step, torch.device("cpu"), original)
    calibration = ids if step.needs_calibration else None
    done = engine.quantize(frames.result, step, calibration, windows, work, "", Silent(), reference=frames.reference)
    streams = done.activations.original, done.activations.compressed
    quality = measure(frames.result, windows, *streams, Silent(), reference=frames.reference).quality
    layout(form).write(source, done.model, out, Silent())
    return done, quality


def _target(step: Sparsify) -> str:
    return step.pattern or f"{step.sparsity:.0%}"


def _print(name: str, target: str, rows: list[Made]) -> None:
    def median(figures: list[float | None]) -> float:
        return statistics.median(one for one in figures if one is not None)

    perplexity = median([one.quality.perplexity_after for one in rows])
    divergence = median([one.quality.divergence_nats for one in rows])
    zstd = "" if rows[0].zstd_bytes is None else f"{median([one.zstd_bytes for one in rows]) / 1e6:.2f} MB"
    faster = ["", ""]
    if rows[0].faster is not None:
        faster = [f"{median([one.faster and one.faster[n] for one in rows]):.2f}" for n in range(2)]
    print(
        f"| {name} | {target} | {perplexity:.3f} | {divergence:.4f} | {rows[0].parameters:,} | {rows[0].nonzero:,} "
        f"| {rows[0].bytes / 1e6:.2f} MB | {zstd} | {faster[0]} | {faster[1]} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
