"""Memory of each process that shares a full finetuning, by their number and by what each holds; and the losses.

    python benchmarks/sharding.py [--width 1024] [--blocks 8] [--processes 1 2 4] [--ways ddp full hybrid offload zero3]

Writes random weights of a Llama's shape, and trains all of them for some steps with one process, then with several on
this CPU. Peaks are of resident memory above what the process had taken before it loaded the model: while it loads, one
process after the other (zero1 to zero3: all at once); and while it trains, with looks at the held-out loss and a
checkpoint.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim import AdamW  # noqa: E402

from benchmarks.wide import make  # noqa: E402
from models.files.checkpoint import INDEX, open_model  # noqa: E402
from models.job import Inputs  # noqa: E402
from models.progress import Silent  # noqa: E402
from models.resources import peak_host_bytes, return_free_memory  # noqa: E402
from models.streaming.team import Team  # noqa: E402
from models.train.checkpoints import Checkpoints  # noqa: E402
from models.train.loop import train  # noqa: E402
from models.train.prepare import begun, prepare  # noqa: E402
from models.train.processes import Processes  # noqa: E402
from models.train.task import accelerator_of  # noqa: E402
from squeeze.specs.job_spec import JobSpec  # noqa: E402
from squeeze.steps.sharding import ZERO_STAGES, Way  # noqa: E402
from squeeze.steps.training import Train  # noqa: E402

CLEAR_PEAK = "5"  # what /proc/self/clear_refs takes for: from now on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=["ddp", "full", "hybrid", "offload"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--as-one-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.as_one_of:
        one_of(options, **options.as_one_of)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make(model, options.width, options.blocks)
        source = open_model(model)
        index = {"metadata": {}, "weight_map": {name: entry.path.name for name, entry in source.entries.items()}}
        (model / INDEX).write_text(json.dumps(index), encoding="utf-8")  # transformers wants one
        print(
            f"{options.blocks} blocks of width {options.width}: {source.parameters / 1e6:.0f} M parameters, "
            f"{source.weight_bytes / 1e6:.0f} MB; {options.steps} steps of 4 sequences of {options.length} tokens"
        )
        print("| processes | way | MB while each trains | while it loads | worst difference of the losses |")
        print("|---|---|---|---|---|", flush=True)
        alone: list[float] = []
        for size in options.processes:
            for way in ["ddp"] if size == 1 else options.ways:
                told = run(options, Path(folder) / f"{way}-{size}", model, way, size)
                losses = told[0]["losses"]
                alone = alone or losses
                worst = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
                trains, loads = (", ".join(f"{one[key] / 1e6:.0f}" for one in told) for key in ("training", "loading"))
                print(f"| {size} | {'' if size == 1 else way} | {trains} | {loads} | {worst:.1g} |", flush=True)


def run(options: Any, room: Path, model: Path, way: str, size: int) -> list[dict[str, Any]]:
    """What each process says of itself, by rank."""
    room.mkdir()
    own = ["--steps", str(options.steps), "--length", str(options.length)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                *own,
                "--as-one-of",
                json.dumps({"room": str(room), "model": str(model), "way": way, "size": size, "rank": rank}),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def one_of(options: Any, room: str, model: str, way: Way, size: int, rank: int) -> None:
    """One process of them: loads in its turn, trains, saves the checkpoint of the last step."""
    step = {"kind": "finetune", "method": "full", "steps": options.steps, "batch_size": 4}
    data = {"source": "file-abcdefgh", "sequence_length": options.length}
    spec = JobSpec.model_validate({"model": "org/model", "steps": [step], "data": data})
    full, team = spec.steps[0], Team.meeting_at(Path(room) / "store", rank, size, "cpu")
    assert isinstance(full, Train)
    inputs = Inputs(
        spec=spec,
        model=Path(model),
        model_name="model",
        revision="0",
        calibration_text=_examples(Path(room) / f"rows-{rank}.jsonl"),
        work=Path(room) / "work",
        out=Path(room) / "out",
        device="cpu",
        job_id="job",
    )
    prepared = prepare(inputs, full)
    accelerator = accelerator_of(prepared.precision, prepared.device)
    with team.together():
        prepared = replace(prepared, processes=Processes(team, way, at_once=way in ZERO_STAGES))
        small = nn.Sequential(nn.Linear(8, 8))  # at the first of which torch imports another 100 MB
        prepared.processes.shard(small, [*small], full, prepared.precision)
        prepared.processes.called(small)(torch.ones(8)).sum().backward()
        AdamW(small.parameters()).step()
        prepared.processes.let_go()
        idle = peak_host_bytes()
        task = begun(prepared)[0]
        loading = peak_host_bytes() - idle
        return_free_memory()
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
        checkpoints = Checkpoints(inputs.work / "train", "", team)
        story = train(task, accelerator, checkpoints, Silent(), 1e9)
        training = peak_host_bytes() - idle
    print(json.dumps({"loading": loading, "training": training, "losses": [one.loss for one in story.curve]}))


def _examples(path: Path) -> Path:
    dice = random.Random(0)
    words = ["plus", "is", "the", "sum", "of", "and", "number", "what"]
    rows = [{"text": " ".join(dice.choice(words) for _ in range(200))} for _ in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
