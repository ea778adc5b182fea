"""Calibration text that the model samples itself, for a user who has none: what it speaks is what it was trained on.

The way is that of LLM-QAT (arXiv 2305.17888 §3.1), which found text sampled from the model's own distribution to serve
better than real text of another kind, and of self-calibration (arXiv 2410.17170), which samples from the
beginning-of-sequence token and starts hot, so that the sequences part early: the schedule of arXiv 2012.07805 §5.1
(10 down to 1 over 20 tokens), here from `START_TEMPERATURE` down to `FINAL_TEMPERATURE` over `COOLING_TOKENS`.
Differs: LLM-QAT draws the first token from the vocabulary and takes the likeliest next three to five; here a first
token is drawn only where the tokenizer has none that begins a text, and none is taken for being likeliest: what is
sampled from one start token would then begin alike. A text that ends before its sequence does is followed by another,
as texts were packed in training. No top-k: the tail is part of what the model speaks.

Every token goes through the whole model, so the model must fit in memory whole: streamed block by block, each token
would read all of it from disk again.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from models.progress import Notify
from models.resources import available_host_bytes, return_free_memory
from models.streaming.frame import Frame
from squeeze.errors import DataUnusable, NotFinite
from squeeze.objects import Stage

START_TEMPERATURE, FINAL_TEMPERATURE, COOLING_TOKENS = 2.0, 1.0, 10
RECIPE = 1  # counts up when the same seed gives other text
MOST_SEQUENCES = 64  # at once: a step reads all weights, however many sequences it serves
CACHE_BYTES = 1 << 30  # of keys and values, bounds the sequences further
SLACK_BYTES = 512 << 20  # logits, a block's work, fragments
LOADING_SHARE = 1.1  # of the weights' bytes: shards are read one tensor at a time


@dataclass(frozen=True)
class Need:
    """Bytes: of the weights in the computing type, of keys and values of all sequences that are sampled at once."""

    weights: int
    cache: int

    @property
    def whole(self) -> int:
        return int(self.weights * LOADING_SHARE) + self.cache + SLACK_BYTES


def need_of(frame: Frame, samples: int, length: int, dtype: torch.dtype) -> Need:
    """What sampling in a type takes of memory, from the config alone."""
    cache = _at_once(frame, samples, length, dtype) * _cache_bytes(frame, length, dtype)
    return Need(frame.parameters * dtype.itemsize, cache)


def refuse_beforehand(frame: Frame, samples: int, length: int) -> None:
    """As `refuse_too_large`, from the config alone, before any weight is fetched; on whichever device has more room."""
    stored = frame.model.config.dtype
    need = need_of(frame, samples, length, stored if isinstance(stored, torch.dtype) else torch.bfloat16)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    refuse_too_large(need, *max(free_bytes_of(torch.device(device)) for device in devices))


def refuse_too_large(need: Need, free_bytes: int, where: str) -> None:
    """Raises DataUnusable, with figures, where the model does not fit whole. where: `host memory`, `GPU memory`."""
    if need.whole > free_bytes:
        raise DataUnusable(
            f"a model that samples its own calibration text must fit in memory whole: this one needs about "
            f"{need.whole / 2**30:.1f} GiB ({need.weights / 2**30:.1f} of them weights), and {free_bytes / 2**30:.1f} "
            f"GiB of {where} are free. Name a text instead (a file or hub:org/name), or take a larger worker.",
            param="data.source",
        )


def free_bytes_of(device: torch.device) -> tuple[int, str]:
    """Memory that sampling on a device could take, and what it is called."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "GPU memory"
    return available_host_bytes(), "host memory"


def sampled_text(
    frame: Frame, tokenizer: Any, samples: int, length: int, seed: int, work: Path, notify: Notify
) -> tuple[Tensor, str]:
    """`samples` sequences of `length` tokens of the model's own, (n, T) int64, and what the report calls them.

    The seed decides them: on one machine's CPU exactly, elsewhere as far as the arithmetic rounds alike. work: keeps
    what was sampled, batch by batch, so that another attempt does not sample it again. Raises DataUnusable where the
    model does not fit in memory, NotFinite where it gives no probabilities.
    """
    start = _Start.of(tokenizer, int(frame.model.config.get_text_config().vocab_size))
    origin = (
        f"sampled by the model itself (each text from {start.words}, temperature {START_TEMPERATURE:g} down to "
        f"{FINAL_TEMPERATURE:g} over {COOLING_TOKENS} tokens)"
    )
    at_once = _at_once(frame, samples, length, frame.dtype)
    kept = _kept(work, _fingerprint(frame, samples, length, seed, at_once, start))
    counts = [min(at_once, samples - first) for first in range(0, samples, at_once)]
    files = [kept / f"{number:05d}.safetensors" for number in range(len(counts))]
    if not all(file.is_file() for file in files):
        refuse_too_large(need_of(frame, samples, length, frame.dtype), *free_bytes_of(frame.device))
        notify.stage(Stage.calibrating)
        notify.event("info", f"the model samples {samples * length:,} tokens of its own to be calibrated on")
        model = _loaded(frame)
        for number, (count, file) in enumerate(zip(counts, files, strict=True)):
            if file.is_file():
                continue
            generator = torch.Generator().manual_seed(_mixed(seed, number))
            ids = torch.empty((count, length), dtype=torch.int64)
            for position, tokens in enumerate(_sample(model, start, count, length, generator, frame.device)):
                ids[:, position] = tokens
                notify.advance(number * at_once * length + count * (position + 1), samples * length, "tokens")
            save_file({"ids": ids}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        del model
        return_free_memory()
    return torch.cat([load_file(file)["ids"] for file in files]), origin


def temperature_at(position: int) -> float:
    """For the token that is `position` tokens after a text's start token."""
    cooled = min(max(position - 1, 0) / COOLING_TOKENS, 1.0)
    return START_TEMPERATURE + (FINAL_TEMPERATURE - START_TEMPERATURE) * cooled


@dataclass(frozen=True)
class _Start:
    """How texts begin and end. bos: the token that begins one; None: drawn. known: ids that the tokenizer has."""

    bos: int | None
    eos: int | None
    known: int
    special: tuple[int, ...]
    words: str

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> "_Start":
        known = min(len(tokenizer), vocabulary)
        bos, eos = (
            one if one is not None and one < known else None for one in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        words = "a token drawn from the vocabulary" if bos is None else str(tokenizer.convert_ids_to_tokens(bos))
        special = tuple(one for one in tokenizer.all_special_ids if one < known)
        return cls(bos, eos, known, special, words)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """First tokens of `count` texts, (n,) int64."""
        if self.bos is not None:
            return torch.full((count,), self.bos)
        chances = torch.ones(self.known)
        chances[list(self.special)] = 0.0
        return torch.multinomial(chances, count, replacement=True, generator=generator)


def _sample(
    model: Any, start: _Start, count: int, length: int, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """The tokens of `count` sequences, position by position: `length` times (n,) int64, on the host."""
    tokens = start.draw(count, generator)
    age = torch.zeros(count, dtype=torch.int64)  # tokens since each sequence's latest text began
    cache = None
    yield tokens
    with torch.inference_mode():
        for _ in range(1, length):
            out = model(input_ids=tokens[:, None].to(device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1, : start.known].float().cpu()  # (n, V); rows beyond were never trained
            age += 1
            temperature = torch.tensor([temperature_at(n) for n in age.tolist()])
            chances = torch.softmax(logits / temperature[:, None], dim=-1)
            if not torch.isfinite(chances).all():
                raise NotFinite(
                    f"the model gives NaN or infinity in {model.dtype} where it should give probabilities; it is "
                    "damaged, or does not fit that type"
                )
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
            if start.eos is not None and start.bos == start.eos:  # one token ends a text and begins the next
                age[drawn == start.eos] = 0
            elif start.eos is not None and (ended := tokens == start.eos).any():
                drawn[ended] = start.draw(int(ended.sum()), generator)
                age[ended] = 0
            tokens = drawn
            yield tokens


def _loaded(frame: Frame) -> Any:
    """The whole model, in the type and on the device that the job computes with."""
    transformers_logging.disable_progress_bar()  # a worker's log is no terminal
    placed = {} if frame.device.type == "cpu" else {"device_map": {"": str(frame.device)}}
    model = AutoModelForCausalLM.from_pretrained(
        frame.source.path, dtype=frame.dtype, trust_remote_code=False, use_safetensors=True, **placed
    )
    return model.eval().requires_grad_(False)


def _at_once(frame: Frame, samples: int, length: int, dtype: torch.dtype) -> int:
    """Sequences in a batch: the same on every machine, because the batch decides how sums round."""
    return max(1, min(samples, MOST_SEQUENCES, CACHE_BYTES // _cache_bytes(frame, length, dtype)))


def _cache_bytes(frame: Frame, length: int, dtype: torch.dtype) -> int:
    """Of one sequence's keys and values."""
    config = frame.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "qk_nope_head_dim"):  # latent attention keeps its keys and values unfolded
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
    return 2 * frame.count * int(heads) * int(width) * length * dtype.itemsize


def _mixed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _fingerprint(frame: Frame, samples: int, length: int, seed: int, at_once: int, start: _Start) -> str:
    entries = frame.source.entries.values()
    parts = {
        "recipe": [RECIPE, START_TEMPERATURE, FINAL_TEMPERATURE, COOLING_TOKENS],
        "sizes": [samples, length, seed, at_once],
        "start": [start.bos, start.eos, start.known, start.special],
        "model": [frame.source.config, frame.source.weight_bytes, sorted(frame.source.names())],
        "written": sorted({entry.path.stat().st_mtime_ns for entry in entries}),
        "computed": [str(frame.dtype), frame.device.type],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _kept(work: Path, fingerprint: str) -> Path:
    """The directory of what is kept, emptied of another recipe's or model's leavings."""
    directory = work / "self_text"
    mark = directory / "fingerprint"
    if directory.exists() and (not mark.is_file() or mark.read_text() != fingerprint):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    return directory
