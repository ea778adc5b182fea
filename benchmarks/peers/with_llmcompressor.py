"""Quantizes with llm-compressor, in its own environment: python with_llmcompressor.py JOB.json.

JOB.json: model, tokens (a safetensors file with `ids` (n, T) int64), out, bits, group_size. Prints the seconds that the
quantization itself took.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from usage import Usage


def main(job: dict) -> None:
    torch.set_num_threads(1)
    usage = Usage()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = load_file(job["tokens"])["ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    weights = QuantizationArgs(
        num_bits=job["bits"],
        type="int",
        symmetric=True,
        strategy="group",
        group_size=job["group_size"],
        actorder="static",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    usage.start()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    usage.stop()
    model.save_pretrained(job["out"], save_compressed=True)
    tokenizer.save_pretrained(job["out"])
    usage.report()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
