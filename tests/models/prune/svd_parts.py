"""A model whose linears were factored, without the rest of the pipeline."""

from pathlib import Path

from models.files.checkpoint import open_model
from models.progress import Silent
from models.prune.factors.factoring import Ranked, ranked
from models.streaming.team import SOLO
from models.streaming.teamwork import frames_of, lead
from models.weights.quantized import QuantizedModel
from squeeze.steps.factoring import SVD
from tests.models.engine_parts import CPU, thrown


def factored(model: Path, work: Path, step: SVD) -> tuple[QuantizedModel, Ranked]:
    """On three short windows of dice."""
    frames, ids = frames_of(open_model(model), step, CPU), thrown().ids
    made = ranked(frames.result, step, ids, work / "spectra", "", Silent())
    done = lead(SOLO, frames, step, ids, None, work / "factors", "", Silent(), schemes=made.schemes, method=made)
    return done.model, made
