"""Quantizes with AutoRound's library, in its own environment: python with_autoround.py JOB.json.

JOB.json: see with_llmcompressor.py; besides, method (`autoround`, or `awq`: the library's scaling before plain
rounding), iterations (absent: the library's own 200) and symmetric (absent: true). Written unpacked (`fake`), so that
bits that its packed formats lack can be judged too.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.transforms.awq.config import AWQConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from usage import Usage

BATCH = 8


def main(job: dict) -> None:
    torch.set_num_threads(1)
    usage = Usage()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = load_file(job["tokens"])["ids"]
    settings = {"bits": job["bits"], "group_size": job["group_size"], "sym": job.get("symmetric", True)}
    if job["method"] == "awq":
        how = {"alg_configs": [AWQConfig(**settings), RTNConfig(**settings)]}
    else:
        how = {"iters": job.get("iterations", 200)}
    quantizer = AutoRound(
        model,
        tokenizer,
        **settings,
        **how,
        dataset=[{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)],
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=BATCH,
        device_map="cpu",
        seed=job.get("seed", 42),
        enable_torch_compile=False,
    )
    usage.start()
    quantizer.quantize()
    usage.stop()
    out = Path(job["out"])
    quantizer.save_quantized(str(out), format="fake")
    nested = next(iter(out.rglob("config.json"))).parent  # it may add a directory of its own
    if nested != out:
        shutil.copytree(nested, out, dirs_exist_ok=True)
    usage.report()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
