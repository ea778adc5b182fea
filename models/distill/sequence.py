"""Distillation from the text that the teacher writes after the examples' prompts (arXiv 1606.07947)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.distill.teaching import Taught, Teaching
from models.distill.writing import ends_of, gone_on
from models.files.disk import write_once, write_whole
from models.progress import Notify
from models.train.scoring import learned_losses
from squeeze.costs.distillation_work import WRITTEN_AT_ONCE
from squeeze.errors import DataUnusable
from squeeze.steps.distillation import Sequence
from squeeze.texts.records import Chat, Exchange, Record, Text


def distill(step: Sequence, teaching: Teaching) -> Taught:  # noqa: ARG001 - the teacher has written beforehand
    """The teacher's text is learned like any other."""
    return Taught(learned_losses)


@dataclass(frozen=True)
class Prompt:
    """ids: (t,), what the teacher goes on from. record: makes a record of what it wrote."""

    ids: Tensor
    record: Callable[[str], dict[str, Any]]


def prompt_of(tokenizer: Any, record: Record, tokens: int) -> Prompt | None:
    """tokens: of a text, from which the teacher goes on; None where the text has no more."""
    if isinstance(record, Exchange):
        ids = list(tokenizer(record.prompt, verbose=False)["input_ids"])
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        prompt = record.prompt
        return Prompt(torch.tensor(ids), lambda wrote: {"prompt": prompt, "completion": wrote}) if ids else None
    if isinstance(record, Chat):
        last = max(n for n, message in enumerate(record.messages) if message["role"] == "assistant")
        before = list(record.messages[:last])
        text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Prompt(
            torch.tensor(ids),
            lambda wrote: {"prompt": before, "completion": [{"role": "assistant", "content": wrote}]},
        )
    return _beginning(tokenizer, record, tokens)


def wrote(
    step: Sequence,
    load: Callable[[], Any],
    tokenizer: Any,
    records: list[Record],
    length: int,
    seed: int,
    directory: Path,
    mark: str,
    notify: Notify,
) -> Path:
    """A file of records as the teacher ends them; kept between attempts, some prompts at a time.

    load: the teacher, which is asked for only where something is left to write. length: of prompt and end together, in
    tokens; longer prompts are left out. mark: of all that decides what is written. Raises DataUnusable where nothing
    is.
    """
    prompts = [one for record in records if (one := prompt_of(tokenizer, record, step.prompt_tokens)) is not None]
    prompts = sorted((one for one in prompts if len(one.ids) < length), key=lambda one: len(one.ids))
    own = directory / hashlib.sha256(mark.encode()).hexdigest()[:16]
    own.mkdir(parents=True, exist_ok=True)
    files = [own / f"{number:06d}.json" for number in range(-(-len(prompts) // WRITTEN_AT_ONCE))]
    if not all(file.is_file() for file in files):
        notify.event("info", f"the teacher writes what follows {len(prompts):,} prompts")
        model = load()
        ends = ends_of(tokenizer, model.config)
        for number, file in enumerate(files):
            if not file.is_file():
                some = prompts[number * WRITTEN_AT_ONCE : (number + 1) * WRITTEN_AT_ONCE]
                torch.manual_seed((seed * 1_000_003 + number) % 2**63)  # the same whoever goes on from here
                room = min(step.new_tokens, length - max(len(one.ids) for one in some))
                written = gone_on(model, [one.ids for one in some], room, step.temperature, ends, len(tokenizer))
                texts = [tokenizer.decode(one, skip_special_tokens=True) for one in written]
                write_whole(file, json.dumps(texts))
            notify.advance(number + 1, len(files), "prompts")
    texts = [text for file in files for text in json.loads(file.read_text(encoding="utf-8"))]
    lines = [json.dumps(one.record(text)) for one, text in zip(prompts, texts, strict=True) if text.strip()]
    if not lines:
        raise DataUnusable(
            "the teacher wrote nothing after any prompt: it ends at once, or all prompts are longer than "
            f"{length} tokens. Take a longer data.sequence_length, or another text.",
            param="data.source",
        )
    whole = own / "records.jsonl"
    write_once(whole, "\n".join(lines) + "\n")
    return whole


def _beginning(tokenizer: Any, record: Text, tokens: int) -> Prompt | None:
    ids = tokenizer(record.text, verbose=False)["input_ids"][:tokens]
    begun = tokenizer.decode(ids, skip_special_tokens=True)
    return Prompt(torch.tensor(ids), lambda wrote: {"prompt": begun, "completion": wrote}) if begun.strip() else None
