"""Quantizes with GPTQModel: python with_gptqmodel.py JOB.json (see with_llmcompressor.py)."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from usage import Usage


def main(job: dict) -> None:
    torch.set_num_threads(1)
    usage = Usage()
    ids = load_file(job["tokens"])["ids"]
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True)
    model = GPTQModel.load(job["model"], config, device="cpu")
    usage.start()
    model.quantize(examples, batch_size=8)
    usage.stop()
    model.save(job["out"])
    usage.report()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
