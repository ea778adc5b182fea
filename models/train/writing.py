"""What a training leaves on disk: what adapters learned, the whole model, factors beside it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from models.files.disk import write_whole
from models.formats.directory import write_companions, written_whole
from models.job import Inputs
from models.progress import Notify
from models.train.factors import FACTORS, keep_factors, multiply_out
from models.train.merging import stored_dtype, write_merged
from models.train.prepare import Prepared, method_of
from models.train.whole import write_trained
from models.weights.plain import saturated
from squeeze.steps.finetuning import Adapters, Head


def gather(prepared: Prepared, model: Any) -> None:
    """Puts together what was learned where each process holds a part: of a model that is written whole all weights,
    already in the type that they are stored in.
    """
    alone = isinstance(prepared.step, Adapters)
    dtype = stored_dtype(prepared.source)
    each = (lambda one: one) if alone else (lambda one: saturated(one, dtype))
    prepared.processes.gather(model, each, entire=not alone)


def write(
    prepared: Prepared,
    model: Any,
    initial: dict[str, Tensor],
    inputs: Inputs,
    adapter: Path,
    whole: Path | None,
    notify: Notify,
) -> None:
    """What was learned, from the model that it stands in, which is worth nothing afterwards."""
    step, source, method = prepared.step, prepared.source, method_of(prepared.step)
    if isinstance(step, Adapters):
        with written_whole(adapter) as partial:
            write_companions(source, partial)
            method.write(model, step, initial, partial, inputs.model_name, inputs.revision)
    note = inputs.work / "whole-by"
    if whole is None or (whole.is_dir() and note.is_file() and note.read_text(encoding="utf-8") == prepared.mark):
        return
    if isinstance(step, Adapters):
        write_merged(source, prepared.sites, method.Merged(adapter), whole, notify)
    elif isinstance(step, Head):
        method.write(model, prepared.labels, source, whole)
    else:
        if prepared.factors is not None:
            keep_factors(model, source, prepared.factors, inputs.work / FACTORS)
            multiply_out(model, source)
        write_trained(model, source, whole)
    write_whole(note, prepared.mark)
