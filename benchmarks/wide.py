"""Three blocks of a 70B-shaped Llama on this machine: `python benchmarks/wide.py [--width 8192] [--blocks 3]`.

A model of 80 such blocks would be 140 GB. Its blocks come and go one at a time, so three of them show what each takes.
Writes random weights, runs the pipeline without its certification (which loads the result whole), prints seconds and
peak memory of every block, what they say of 80, and beside that what a plan says of 3 blocks and of 80.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig  # noqa: E402

from models.files.checkpoint import open_model  # noqa: E402
from models.formats import layout  # noqa: E402
from models.progress import Silent  # noqa: E402
from models.resources import peak_host_bytes  # noqa: E402
from models.streaming import engine  # noqa: E402
from models.streaming.frame import Frame  # noqa: E402
from models.texts.data import calibration_batches  # noqa: E402
from squeeze.costs.memory import needed  # noqa: E402
from squeeze.costs.pace import REFERENCE_MACHINE, reference_seconds  # noqa: E402
from squeeze.costs.work import counted  # noqa: E402
from squeeze.shapes.model import Shape  # noqa: E402
from squeeze.specs.job_spec import JobSpec  # noqa: E402
from squeeze.steps.every import tag_of  # noqa: E402
from squeeze.steps.quantization import METHODS  # noqa: E402

BUNDLED = ROOT / "models/bundled"
WHOLE = 80  # blocks of the model that has this shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--step", type=json.loads, default={"method": "gptq", "bits": 4}, help="as JSON")
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        model = Path(folder) / "model"
        make(model, options.width, options.blocks)
        idle = peak_host_bytes()
        measure(model, Path(folder), options, idle)


def make(directory: Path, width: int, blocks: int) -> None:
    """Random bfloat16 weights in the shape of Llama 3 70B (arXiv 2407.21783, table 3), a shard a block."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 1024),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, directory)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    wide, heads = config.intermediate_size, config.num_key_value_heads * 128
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (heads, width),
        "self_attn.v_proj": (heads, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (wide, width),
        "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide),
    }
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save_file(tensors, directory / f"model-{block:05d}.safetensors")
        del tensors
    rest = {"model.embed_tokens.weight": normal(4096, width), "model.norm.weight": torch.ones(width).bfloat16()}
    save_file(rest, directory / "model-rest.safetensors")


def measure(model: Path, folder: Path, options: argparse.Namespace, idle: int) -> None:
    source = open_model(model)
    frame = Frame(source, source.dtype, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    method = next(one for one in METHODS if tag_of(one) == f"quantize.{options.step['method']}")
    step = method.model_validate(options.step)
    ids = calibration_batches(tokenizer, None, None, options.samples, options.length, 0).ids
    print(
        f"{options.blocks} blocks of width {options.width}, {ids.numel():,} tokens, {json.dumps(options.step)}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads; {source.weight_bytes / 1e9:.1f} GB of weights; idle {idle / 1e6:.0f} MB")
    print("| block | seconds | peak host memory so far, MB |\n|---|---|---|", flush=True)

    class Prints(Silent):
        def __init__(self) -> None:
            self.began = time.monotonic()
            self.seconds: list[float] = []

        def stage(self, stage: Any) -> None:  # noqa: ARG002
            self.began = time.monotonic()

        def advance(self, done: int, total: int, unit: str) -> None:  # noqa: ARG002
            if unit == "blocks":
                self.seconds.append(time.monotonic() - self.began)
                print(f"| {done} | {self.seconds[-1]:.1f} | {peak_host_bytes() / 1e6:.0f} |", flush=True)
                self.began = time.monotonic()

    notify = Prints()
    done = engine.quantize(frame, step, ids, None, folder / "work", "", notify)
    compressed = peak_host_bytes()
    began = time.monotonic()
    layout("compressed-tensors").write(source, done.model, folder / "out", Silent())
    written = time.monotonic() - began
    each = sorted(notify.seconds)[len(notify.seconds) // 2]
    print(
        f"writing: {written:.1f} s; peak of it all {peak_host_bytes() / 1e6:.0f} MB, {compressed / 1e6:.0f} before it"
    )
    print(f"{WHOLE} blocks would take {WHOLE * (each + written / options.blocks) / 3600:.2f} h at the same peak")
    print(f"the plan, for {REFERENCE_MACHINE}:")
    print("| blocks | seconds a block | seconds to write | hours | peak, MB |\n|---|---|---|---|---|")
    shape = source.shape(step.ignore)
    for blocks in (options.blocks, WHOLE):
        foretell(replace(shape, blocks=shape.blocks[:1] * blocks), options)


def foretell(shape: Shape, options: argparse.Namespace) -> None:
    """What the plan's formulas say of the same work on a model of that shape."""
    spec = JobSpec.model_validate(
        {
            "model": "bench/wide",
            "steps": [{"kind": "quantize", **options.step}],
            "data": {"samples": options.samples, "sequence_length": options.length},
            "evaluation": {"perplexity": False, "divergence": False},
        }
    )
    counts = counted(shape, spec)
    seconds = {
        stage: reference_seconds(options.step["method"], stage, counts[stage].whole)
        for stage in ("compressing", "exporting")
    }
    print(
        f"| {len(shape.blocks)} | {seconds['compressing'] / len(shape.blocks):.1f} | {seconds['exporting']:.1f} "
        f"| {sum(seconds.values()) / 3600:.2f} | {needed(shape, spec).job / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
