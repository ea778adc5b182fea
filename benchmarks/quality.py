"""Quality side by side: our GPTQ, RTN and QAT against llm-compressor's and GPTQModel's GPTQ, same model, tokens, bits.

    python benchmarks/quality.py [--model DIR] [--draws 3] [--bits 4 3 2] [--methods qat …]
        [--llmcompressor-python PYTHON] [--autoround-python PYTHON]

Every directory that comes out is judged alike: loaded by transformers, its logits compared with the original's on
held-out windows. llm-compressor lives in an environment of its own (`pip install llmcompressor==0.14.0.1`, its
interpreter given by `--llmcompressor-python`), and so does AutoRound's library (`pip install auto-round==0.16.1`,
`--autoround-python`), which serves as the peer of AWQ too; left out, its rows are missing and the table says so.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.texts.data import calibration_batches, evaluation_windows

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "models" / "bundled"
OPTIONS = {"qat-weights": {"train": "weights"}, "qat-autoround": {"start": "autoround"}}


def judge(original: Path, directory: Path, windows: torch.Tensor) -> tuple[float, float]:
    """(perplexity, mean KL(original ‖ result) in nats) on windows (n, T), logits compared in float32."""
    before = AutoModelForCausalLM.from_pretrained(original, dtype="auto").eval()
    after = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    nll = divergence = 0.0
    count = 0
    with torch.no_grad():
        for ids in windows:
            p = torch.log_softmax(before(ids[None]).logits[0, :-1].float(), -1)
            q = torch.log_softmax(after(ids[None]).logits[0, :-1].float(), -1)
            nll -= float(q.gather(-1, ids[1:, None]).sum())
            divergence += float((p.exp() * (p - q)).sum())
            count += len(ids) - 1
    return math.exp(nll / count), divergence / count


def quantize(peer: str, python: str, job: dict) -> float:
    """Runs one peer in its own process; its seconds."""
    file = Path(job["out"]).with_suffix(".json")
    file.write_text(json.dumps(job))
    command = [python, str(HERE / "peers" / f"with_{peer}.py"), str(file)]
    # In the temporary directory, because GPTQModel writes its log below wherever it runs.
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent)
    if ended.returncode:
        raise SystemExit(f"{peer} failed:\n{ended.stderr[-3000:]}")
    return float(json.loads(ended.stdout.strip().splitlines()[-1])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, help="calibration and evaluation text; default: the generic text")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument(
        "--methods", nargs="+", help="rows of these alone: rtn, gptq, qat, qat-weights, qat-autoround, awq, autoround"
    )
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--llmcompressor-python", type=os.path.abspath)
    parser.add_argument("--autoround-python", type=os.path.abspath)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = evaluation_windows(tokenizer, options.text, None, True, options.windows, options.length, None).ids
    plain, _ = judge(options.model, options.model, windows)
    print(f"original: perplexity {plain:.3f} on {windows.numel():,} held-out tokens")
    print("bits  engine              perplexity          divergence (nats)   seconds  [median (min – max) of draws]")
    for bits in options.bits:
        peers = [("rtn", "squeeze", sys.executable), ("gptq", "squeeze", sys.executable)]
        peers += [("gptq", "gptqmodel", sys.executable), ("qat", "squeeze", sys.executable)]
        peers += [("qat-weights", "squeeze", sys.executable), ("qat-autoround", "squeeze", sys.executable)]
        if options.autoround_python:
            peers += [("awq", "squeeze", sys.executable), ("awq", "autoround", options.autoround_python)]
            peers += [("autoround", "squeeze", sys.executable), ("autoround", "autoround", options.autoround_python)]
        if options.llmcompressor_python and bits == 4:
            peers.append(("gptq", "llmcompressor", options.llmcompressor_python))
        if options.methods:
            peers = [one for one in peers if one[0] in options.methods]
        rows: dict[str, list[tuple[float, float, float]]] = {}
        for draw in range(options.draws):
            ids = calibration_batches(tokenizer, options.text, None, options.samples, options.length, draw).ids
            for method, peer, python in peers:
                if method == "rtn" and draw:
                    continue  # looks at no data
                with tempfile.TemporaryDirectory() as folder:
                    tokens = Path(folder) / "tokens.safetensors"
                    save_file({"ids": ids}, tokens)
                    job = {
                        "model": str(options.model.resolve()),
                        "tokens": str(tokens),
                        "out": f"{folder}/out",
                        "bits": bits,
                        "group_size": options.group_size,
                        "method": method.partition("-")[0],
                        "options": OPTIONS.get(method, {}),
                        "format": "compressed-tensors",
                    }
                    seconds = quantize(peer, python, job)
                    rows.setdefault(f"{peer} {method}", []).append(
                        (*judge(options.model, Path(job["out"]), windows), seconds)
                    )
        for name, figures in rows.items():
            columns = [_spread([figure[n] for figure in figures]) for n in range(3)]
            print(f"{bits:<5} {name:<19} {columns[0]:<19} {columns[1]:<19} {columns[2]}", flush=True)
    if not options.autoround_python:
        print("AutoRound was not run, nor AWQ: give its interpreter as --autoround-python")
    if not options.llmcompressor_python:
        print("llm-compressor was not run: give its interpreter as --llmcompressor-python")


def _spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.4g} ({min(values):.4g} – {max(values):.4g})" if len(values) > 1 else f"{middle:.4g}"


if __name__ == "__main__":
    main()
