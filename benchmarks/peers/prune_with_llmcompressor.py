"""Prunes with llm-compressor, in its own environment: python prune_with_llmcompressor.py JOB.json.

JOB.json: model, tokens (a safetensors file with `ids` (n, T) int64), out, method (`sparsegpt`, `wanda`), sparsity,
pattern (`2:4`, or null).
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt.base import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda.base import WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(job: dict) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = load_file(job["tokens"])["ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job["method"]]
    structure = {} if job["pattern"] is None else {"mask_structure": job["pattern"]}
    recipe = modifier(sparsity=job["sparsity"], targets=["Linear"], ignore=["re:.*lm_head"], **structure)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
