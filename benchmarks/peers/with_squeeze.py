"""Quantizes with our engine: python with_squeeze.py JOB.json (see with_llmcompressor.py); the method comes from it."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file
from usage import Usage

from models import engine
from models.checkpoint import open_model
from models.formats import layout
from models.frame import Frame
from models.progress import Silent
from squeeze.steps import METHODS, tag_of


def main(job: dict) -> None:
    torch.set_num_threads(1)
    usage = Usage()
    source = open_model(Path(job["model"]))
    frame = Frame(source, source.dtype, torch.device("cpu"))
    method = next(one for one in METHODS if tag_of(one) == f"quantize.{job['method']}")
    step = method(method=job["method"], bits=job["bits"], group_size=job["group_size"])
    ids = load_file(job["tokens"])["ids"]
    out = Path(job["out"])
    usage.start()
    done = engine.quantize(
        frame, step, ids if step.needs_calibration else None, None, out.with_suffix(".work"), "", Silent()
    )
    usage.stop()
    layout(job["format"]).write(source, done.model, out, Silent())
    usage.report()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
