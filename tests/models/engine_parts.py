"""The engine on one model without the rest of the pipeline: seconds instead of the minute that certifying takes."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.measuring.evaluation import measure
from models.progress import Silent
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.teamwork import compute_dtype
from models.texts.data import Windows
from squeeze.reports.parts import Quality, Text
from squeeze.steps.quantization import RTN, Quantize
from tests.models.tiny import VOCABULARY

CPU = torch.device("cpu")
ROUNDING = RTN(method="rtn", group_size=32)


def frame_of(model: Path) -> Frame:
    source = open_model(model)
    return Frame(source, compute_dtype(source.dtype, CPU), CPU)


def thrown(count: int = 3, length: int = 64) -> Windows:
    """Windows of random tokens."""
    ids = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
    text = Text(origin="dice", generic=True, sequences=count, sequence_length=length, tokens=ids.numel(), sha256="")
    return Windows(ids, (1,) * count, length, text)


def compressed(
    model: Path, work: Path, step: Quantize = ROUNDING, windows: Windows | None = None
) -> tuple[engine.Quantization, Quality]:
    """What the engine makes of a model, and what it measured of it."""
    frame, windows = frame_of(model), windows or thrown()
    ids = windows.ids if step.needs_calibration else None
    done = engine.quantize(frame, step, ids, windows, work, "", Silent())
    measured = measure(frame, windows, done.activations.original, done.activations.compressed, Silent())
    return done, measured.quality


def perplexity_in_transformers(model: Path, windows: Windows) -> float:
    """Of the model as transformers loads it, in the type that the engine computes in."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=frame_of(model).dtype).eval()
    with torch.no_grad():
        logits = torch.cat([whole(row[None]).logits[:, :-1].float() for row in windows.ids])
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten()))
