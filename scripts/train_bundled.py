"""Trains the bundled model from nothing: `python scripts/train_bundled.py --out models/bundled`.

A Llama of about 5 million parameters with its own byte-level BPE, trained on the source text of the running
interpreter's standard library (see `models/texts/generic.py`). It exists so that the service can be tried, and
compression can be seen to hurt, on a machine without a network. Writes the model directory and `training.json`, the
curve's end figures.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.texts.generic import standard_library

VOCABULARY = 4096
CONTEXT = 512
END = "<|endoftext|>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in standard_library("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, split: str) -> Tensor:
    """All documents of a split, each begun with the end-of-text token: (N,), int64."""
    ids: list[int] = []
    for _, text in standard_library(split):  # type: ignore[arg-type]
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(ids)


def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, windows: int = 64) -> float:
    """Mean cross-entropy in nats over evenly spread windows of one context each."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, windows).long()
    batch = torch.stack([tokens[s : s + CONTEXT] for s in starts.tolist()])
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in batch.split(8)]
    model.train()
    return sum(losses) / len(losses)


def train(minutes: float, batch_size: int, peak_rate: float, threads: int, out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tokenizer = train_tokenizer()
    tokens, held_out = tokens_of(tokenizer, "train"), tokens_of(tokenizer, "held_out")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    print(f"{parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} held out", flush=True)
    generator = torch.Generator().manual_seed(0)
    began, step, seen = time.monotonic(), 0, 0
    while (spent := (time.monotonic() - began) / (60 * minutes)) < 1.0:
        # Warm up over the first 2 %, then decay along a cosine to a tenth of the peak; the schedule runs on time.
        rate = peak_rate * min(1.0, spent / 0.02) * (0.1 + 0.45 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, peak_rate / 100)
        starts = torch.randint(len(tokens) - CONTEXT - 1, (batch_size,), generator=generator)
        batch = torch.stack([tokens[s : s + CONTEXT] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + batch.numel()
        if step % 100 == 0:
            print(f"step {step} tokens {seen:,} loss {loss.item():.3f} at {spent:.0%}", flush=True)
    held = held_out_loss(model, held_out)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    rounded = held_out_loss(model, held_out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    figures = {
        "parameters": parameters,
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "training_tokens_in_corpus": len(tokens),
        "tokens_seen": seen,
        "steps": step,
        "batch": [batch_size, CONTEXT],
        "peak_learning_rate": peak_rate,
        "last_training_loss": round(loss.item(), 4),
        "held_out_loss": round(held, 4),
        "held_out_perplexity": round(math.exp(held), 3),
        "held_out_perplexity_bf16": round(math.exp(rounded), 3),
        "minutes": minutes,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="training time; more is better")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of one context a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.minutes, options.batch_size, options.learning_rate, options.threads, options.out)
