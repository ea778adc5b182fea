"""Small jobs that trim a vocabulary."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models.prune.slimming.smaller import Done, slimmed
from models.resources import Clock
from squeeze.steps.slimming import Slim
from tests.models.job_parts import Heard, inputs_of
from tests.models.prune.slim_parts import spec_of
from tests.models.prune.tokenizers_of import words

LINES = list(words(8, 40))  # of which the tokenizers saw none
UNSEEN = [*words(3, 10), "naïve café — 漢字 \U0001f600\n\n  def f(x):\n\treturn x"]


def trim(
    step: dict[str, Any],
    model: Path,
    room: Path,
    lines: Sequence[str | dict[str, Any]] = LINES,
    heard: Heard | None = None,
    **changes: Any,
) -> Done:
    """lines: texts or records, of which a file is made. changes: fields of the inputs."""
    room.mkdir(exist_ok=True)
    rows = [{"text": line} if isinstance(line, str) else line for line in lines]
    (room / "text").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    inputs = inputs_of(spec_of({"method": "vocabulary"} | step), model, room / "text", room)
    asked = inputs.spec.steps[0]
    assert isinstance(asked, Slim)
    return slimmed(dataclasses.replace(inputs, **changes), asked, Clock(), heard or Heard())


@torch.no_grad()
def largest_difference(original: Path, result: Path, ids: list[int], numbers: dict[int, int]) -> float:
    """Between logits of the tokens that stay, in float32. numbers: new ones of old ones."""
    before, after = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in (original, result)
    )
    old, new = list(numbers), list(numbers.values())
    said = before(torch.tensor([ids])).logits[0][:, old]
    says = after(torch.tensor([[numbers[one] for one in ids]])).logits[0][:, new]
    return float((said - says).abs().max())
