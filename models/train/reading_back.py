"""What a training wrote, read back: its losses, its zeros, its factors."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from models.certifying.running import Sample
from models.files.checkpoint import open_model
from models.job import Inputs
from models.prune.factors.handed import HandedFactors
from models.prune.zeroing.counting import counted_zeros
from models.train.factors import FACTORS, learned_factors, put
from models.train.prepare import Prepared
from models.train.telling import mean, sample_of
from models.train.zeros import kept_zeros as counted_kept_zeros
from squeeze.reports.report import Sparsity
from squeeze.steps.finetuning import Head
from squeeze.steps.movement import Movement


@dataclass(frozen=True)
class ReadBack:
    """samples: of each directory, held-out examples with the losses that it has. loss: their mean, of what the job is
    written as. zeros_kept: that were there before. zeros: that the training made. factors: that learned.
    """

    samples: dict[Path, Sample]
    loss: float
    zeros_kept: int | None
    zeros: Sparsity | None
    factors: HandedFactors | None


def read_back(
    prepared: Prepared,
    inputs: Inputs,
    whole: Path,
    accelerator: Accelerator,
    *,
    packed: bool,
    kept_zeros: bool,
    last: bool,
) -> ReadBack:
    """whole: the directory of the whole model. packed: as the task that wrote it. kept_zeros: there were some to keep.
    last: the job ends with this training.
    """
    step, factors = prepared.step, None
    sample, loss = _as_written(prepared, whole, packed, accelerator)
    samples = {whole: sample}
    if prepared.factors is not None:
        factors = learned_factors(prepared.factors, inputs.work / FACTORS, whole)
    if factors is not None and last and "onnx" in inputs.spec.formats:
        sample, thin = _as_written(prepared, whole, packed, accelerator, factors)
        samples[inputs.out / "onnx"] = sample.unmasked
        loss = loss if "safetensors" in inputs.spec.formats else thin
    kept = counted_kept_zeros(prepared.source, whole) if kept_zeros and prepared.processes.team.leads else None
    zeros = counted_zeros(prepared.source, whole, prepared.sites, step) if isinstance(step, Movement) else None
    return ReadBack(samples, loss, kept, zeros, factors)


def _as_written(
    prepared: Prepared, whole: Path, packed: bool, accelerator: Accelerator, factors: HandedFactors | None = None
) -> tuple[Sample, float]:
    """The whole model read back: held-out examples with its losses, and their mean. factors: for its linears."""
    with prepared.processes.loading():
        model = prepared.load(whole, prepared.first_device)
        if factors is not None:
            put(model, factors.of(open_model(whole)))
        prepared.share(model)
    task = prepared.task(model, packed=packed)
    losses = task.held_out_losses(accelerator)
    prepared.processes.let_go()
    return sample_of(task.held_out, losses, labels=isinstance(prepared.step, Head)), mean(losses)
