"""Quantizes with our engine: python with_squeeze.py JOB.json (see with_llmcompressor.py); the method comes from it."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from usage import Usage

from models.files.checkpoint import open_model
from models.formats import layout
from models.progress import Silent
from models.streaming import engine
from models.streaming.teamwork import frames_of
from models.train.rounded import Begun, learned_codes, passed_again
from squeeze.steps.every import tag_of
from squeeze.steps.quantization import METHODS, QAT


def main(job: dict) -> None:
    torch.set_num_threads(1)
    usage = Usage()
    source = open_model(Path(job["model"]))
    method = next(one for one in METHODS if tag_of(one) == f"quantize.{job['method']}")
    options = job.get("options", {})
    step = method(method=job["method"], bits=job["bits"], group_size=job["group_size"], **options)
    frames = frames_of(source, step, torch.device("cpu"))
    ids = load_file(job["tokens"])["ids"]
    out = Path(job["out"])
    work = out.with_suffix(".work")
    usage.start()
    first = step.begun if isinstance(step, QAT) else step
    done = engine.quantize(frames.result, first, ids if step.reads_inputs else None, None, work, "", Silent())
    if isinstance(step, QAT):
        begun = Begun(step, frames, ids, None, done, work / "rounded", "")
        done = passed_again(begun, learned_codes(begun, Silent())[0], Silent())
    usage.stop()
    layout(job["format"]).write(source, done.model, out, Silent())
    usage.report()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
