"""GPTQ's seconds, memory and divergence against the peers', alternating in one run on one thread.

    python benchmarks/speed.py [--sizes bundled 30m 1b] [--depths 4 16 64] [--rounds 1] [--out FILE]
        [--llmcompressor-python PYTHON] [--autoround-python PYTHON]

Sizes: the bundled model; a random Llama of 30 M (8 blocks of width 512); one of the 1B shape (16 blocks of width 2048,
with `--blocks-1b` fewer). Depths: random Llamas of width 512 with so many blocks, ours alone, to show how cost grows.
Every engine runs in a process of its own, on the same tokens. Seconds are wall-clock; since a machine is seldom quiet,
of the processor; memory is the peak above the process after its imports. Ours count reading the weights; theirs do not,
who load the model first. The divergence of random models is on random tokens. llm-compressor and AutoRound live in
environments of their own, whose interpreters are named; left out, their rows are missing and the table says so.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.quality import judge
from models.texts.data import calibration_batches, evaluation_windows

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "models" / "bundled"
BITS, GROUP_SIZE = 4, 128


@dataclass(frozen=True)
class Size:
    """A random Llama and how much it is calibrated on."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    samples: int
    length: int = 256


@dataclass(frozen=True)
class Engine:
    """A peer's script, the interpreter that has it, and the job's method in it."""

    name: str
    script: str
    python: str
    method: str = "gptq"


Figures = dict[str, float]  # seconds, cpu_seconds, bytes_above_idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=["bundled", "30m", "1b"], default=["bundled", "30m", "1b"])
    parser.add_argument("--depths", nargs="*", type=int, default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--blocks-1b", type=int, default=16)
    parser.add_argument("--samples-1b", type=int, default=16)
    parser.add_argument("--llmcompressor-python", type=os.path.abspath)
    parser.add_argument("--autoround-python", type=os.path.abspath)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.md")
    options = parser.parse_args()
    sizes = {
        "30m": Size(512, 1536, 8, 8, 8, 128),
        "1b": Size(2048, 8192, options.blocks_1b, 32, 8, options.samples_1b),
    }
    lines = [
        "# Speed against the peers",
        "",
        f"`make bench-speed`, {time.strftime('%-d %B %Y')}: GPTQ, {BITS} bits, groups of {GROUP_SIZE}, bfloat16, one "
        "thread "
        f"of {os.cpu_count()}, torch {torch.__version__}; load average {os.getloadavg()[0]:.1f} at the start.",
        f"Median of {options.rounds} alternating round(s). Memory: peak above the process after its imports.",
        "",
    ]
    for name in options.sizes:
        with _model(sizes.get(name)) as (model, tokens, windows):
            lines += _side_by_side(name, model, tokens, windows, _engines(options), options.rounds)
        _write(options.out, lines)
    if options.depths:
        lines += _by_depth(options.depths)
        _write(options.out, lines)


def _engines(options: argparse.Namespace) -> list[Engine]:
    engines = [Engine("Squeeze", "squeeze", sys.executable), Engine("GPTQModel", "gptqmodel", sys.executable)]
    if options.llmcompressor_python:
        engines.append(Engine("llm-compressor", "llmcompressor", options.llmcompressor_python))
    if options.autoround_python:
        engines.append(Engine("AutoRound", "autoround", options.autoround_python, "autoround"))
    return engines


@contextmanager
def _model(size: Size | None) -> Iterator[tuple[Path, torch.Tensor, torch.Tensor]]:
    """(directory, calibration ids, held-out ids); None: the bundled one."""
    if size is None:
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        ids = calibration_batches(tokenizer, None, None, 64, 512, 0).ids
        yield BUNDLED, ids, evaluation_windows(tokenizer, None, None, True, 24, 512, None).ids
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        _make(model, size)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 4096, (size.samples, size.length), generator=generator)
        yield model, ids, torch.randint(0, 4096, (8, size.length), generator=generator)


def _make(directory: Path, size: Size) -> None:
    """A random bfloat16 Llama with the bundled model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, directory)


def _side_by_side(
    name: str, model: Path, tokens: torch.Tensor, windows: torch.Tensor, engines: list[Engine], rounds: int
) -> list[str]:
    figures: dict[str, list[Figures]] = {engine.name: [] for engine in engines}
    divergences: dict[str, float] = {}
    for _ in range(rounds):
        for engine in engines:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                figures[engine.name].append(_run(engine, model, tokens, out))
                if engine.name not in divergences:
                    divergences[engine.name] = judge(model, out, windows)[1]
            print(name, engine.name, figures[engine.name][-1], divergences[engine.name], flush=True)
    blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    lines = [
        f"## {name}: {blocks} blocks, {tokens.shape[0]} × {tokens.shape[1]} tokens",
        "",
        "| engine | seconds | CPU seconds | MB above idle | divergence, nats | ours, of its CPU seconds | of its memory"
        " |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {key: _median(figures["Squeeze"], key) for key in ("cpu_seconds", "bytes_above_idle")}
    for engine in engines:
        own = {key: _median(figures[engine.name], key) for key in ("seconds", "cpu_seconds", "bytes_above_idle")}
        shares = [f"{ours[key] / own[key]:.0%}" if engine.name != "Squeeze" else "–" for key in ours]
        lines.append(
            f"| {engine.name} | {own['seconds']:.1f} | {own['cpu_seconds']:.1f} | {own['bytes_above_idle'] / 1e6:.0f} "
            f"| {divergences[engine.name]:.5f} | {' | '.join(shares)} |"
        )
    lost = [
        f"{engine.name} has the lower divergence ({divergences[engine.name]:.5f})."
        for engine in engines
        if divergences[engine.name] < divergences["Squeeze"]
    ]
    return [*lines, "", *[f"Lost: {loss}" for loss in lost], *([""] if lost else [])]


def _by_depth(depths: list[int]) -> list[str]:
    lines = [
        "## Cost by depth: blocks of width 512, 16 × 256 tokens, ours",
        "",
        "| blocks | seconds | CPU seconds | MB above idle |",
        "|---|---|---|---|",
    ]
    for depth in depths:
        with _model(Size(512, 1536, depth, 8, 8, 16)) as (model, tokens, _), tempfile.TemporaryDirectory() as folder:
            own = _run(Engine("Squeeze", "squeeze", sys.executable), model, tokens, Path(folder) / "out")
        print(depth, own, flush=True)
        lines.append(
            f"| {depth} | {own['seconds']:.1f} | {own['cpu_seconds']:.1f} | {own['bytes_above_idle'] / 1e6:.0f} |"
        )
    return [*lines, ""]


def _run(engine: Engine, model: Path, tokens: torch.Tensor, out: Path) -> Figures:
    """One engine in its own process, in the temporary directory, because GPTQModel writes its log wherever it runs."""
    save_file({"ids": tokens.contiguous()}, out.with_suffix(".tokens"))
    job = {
        "model": str(model.resolve()),
        "tokens": str(out.with_suffix(".tokens")),
        "out": str(out),
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "method": engine.method,
        "format": "compressed-tensors",
    }
    file = out.with_suffix(".json")
    file.write_text(json.dumps(job))
    ended = subprocess.run(
        [engine.python, str(HERE / "peers" / f"with_{engine.script}.py"), str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if ended.returncode:
        raise SystemExit(f"{engine.name} failed:\n{ended.stderr[-3000:]}")
    figures: Figures = json.loads(ended.stdout.strip().splitlines()[-1])
    return figures


def _median(figures: list[Figures], key: str) -> float:
    return statistics.median(one[key] for one in figures)


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
