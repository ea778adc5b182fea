"""Quantization-aware training of a whole model (`models.quantize.qat`), between two passes of the engine.

The first pass makes the codes that it starts from. The second goes through the model with what became of them: errors,
scales of the cache and figures are those of the result.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.measuring.evaluation import measure
from models.progress import Notify
from models.quantize.problem import Problem, Solution
from models.quantize.qat import Learner
from models.resources import available_device_bytes, return_free_memory
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.snapshots import SNAPSHOT_SECONDS
from models.streaming.teamwork import Frames
from models.texts.data import Windows
from models.train.checkpoints import Checkpoints
from models.train.examples import Examples
from models.train.loop import train
from models.train.packing import Batch, Plan
from models.train.prepare import TYPES, resolved
from models.train.scoring import learned_logits, learned_losses
from models.train.task import Task, accelerator_of
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel, block_file, tensors_of
from squeeze.costs.memory import needed
from squeeze.errors import DataUnusable
from squeeze.objects import Stage
from squeeze.reports.report import Layer
from squeeze.reports.training import Tuning
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import QAT, Quantize
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class Begun:
    """What the training starts from. calibration: (n, T) int64. done: of the first pass. directory: kept between
    attempts. mark: of all that decides the result. activation_bytes: as `engine.quantize` has it.
    """

    step: QAT
    frames: Frames
    calibration: Tensor
    windows: Windows | None
    done: engine.Quantization
    directory: Path
    mark: str
    seed: int = 0
    schemes: Mapping[str, Scheme] | None = None
    snapshot_seconds: float = SNAPSHOT_SECONDS
    activation_bytes: int | None = None


def refuse_too_large_to_train(spec: JobSpec, step: QAT, frame: Frame, device: torch.device | None = None) -> None:
    """Raises DataUnusable, with figures, where the model can't be trained in the memory that is free; needs no weights.

    device: where it would be; None: whichever has more room.
    """
    need = needed(frame.shape(step.ignore), spec).training
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = [torch.device(kind) for kind in kinds] if device is None else [device]
    free = max(map(available_device_bytes, devices))
    if need <= free:
        return
    less = ["fewer sequences at once (micro_batch_size)", "activation_checkpointing"]
    less += ["train: scales"] if step.train == "weights" else []
    less += ["distill: false, which does without the original"] if step.distill else []
    raise DataUnusable(
        f"qat trains a model that is in memory whole: this one needs about {need / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are free. Take {', '.join(less)}, a larger worker, or a method that goes block by "
        "block (gptq, autoround).",
        param="micro_batch_size",
    )


def learned_codes(begun: Begun, notify: Notify) -> tuple[QuantizedModel, Tuning]:
    """Trains, resuming where an earlier attempt stopped, and writes the codes that come of it.

    The activations of the first pass are given back, once they have told how good its codes are.
    """
    step, result, ids = begun.step, begun.frames.result, begun.calibration
    perplexity = divergence = None
    if begun.windows is not None:
        streams = begun.done.activations.original, begun.done.activations.compressed
        quality = measure(result, begun.windows, *streams, notify, reference=begun.frames.reference).quality
        perplexity, divergence = quality.perplexity_after, quality.divergence_nats
    begun.done.activations.release()
    precision = resolved(step.precision, result.device)
    student = Frame(result.source, TYPES[precision], result.device)
    notify.stage(Stage.training)
    learners = _learners(student, step, begun.done.model)
    with ExitStack() as held:
        task = Task(
            model=held.enter_context(student.whole()),
            step=step.descent,
            examples=_examples(ids),
            plan=Plan([(number,) for number in range(len(ids))], step.batch_size, begun.seed, step.steps),
            held_out=_examples(ids[:0]),
            held_out_rows=(),
            packed=False,
            device=result.device,
            objective=_Objective(begun.frames.reference if step.distill else None, held),
        )
        checkpoints = Checkpoints(begun.directory / "train", begun.mark)
        story = train(task, accelerator_of(precision, result.device), checkpoints, notify, begun.snapshot_seconds)
        learned = sum(one.numel() for one in task.learning.values())
        model = _written(begun.done.model, learners, student, begun.directory / "codes")
    del task, learners, student
    return_free_memory()
    seconds = sum(one.seconds for one in story.curve)
    return model, Tuning(
        trained=step.train,
        precision="bf16" if precision == "bf16" else "fp32",
        trainable_parameters=learned,
        sequences=len(ids),
        steps=story.done,
        perplexity_start=perplexity,
        divergence_start=divergence,
        curve=story.curve,
        tokens_per_second=round(sum(one.tokens for one in story.curve) / max(seconds, 1e-9), 1),
        resumed=story.resumed,
    )


def passed_again(begun: Begun, learned: QuantizedModel, notify: Notify) -> engine.Quantization:
    """The engine's pass with the codes that were learned, resuming as any."""
    step = begun.step
    layers = {layer.name: layer for block in begun.done.blocks for layer in block.layers}
    done = engine.quantize(
        begun.frames.result,
        step,
        begun.calibration if step.wanted() or step.kv_cache is not None else None,
        begun.windows,
        begun.directory / "result",
        begun.mark,
        notify,
        begun.snapshot_seconds,
        schemes=begun.schemes,
        reference=begun.frames.reference,
        memory_bytes=begun.activation_bytes,
        method=_Learned(learned, layers),
    )
    blocks = [
        block.model_copy(update={"seconds": before.seconds + block.seconds})
        for before, block in zip(begun.done.blocks, done.blocks, strict=True)
    ]
    return replace(done, blocks=blocks)


@dataclass(frozen=True)
class _Learned:
    """In the place of a method: codes that are known. layers: what the first pass told of each linear."""

    model: QuantizedModel
    layers: Mapping[str, Layer]

    def quantize(self, problem: Problem, step: Quantize) -> Solution:  # noqa: ARG002 - a method's arguments
        parts = [cast(Codes, self.model.codes(name)).tensors() for name in problem.names]
        joined = {name: torch.cat([part[name] for part in parts]).to(problem.W.device) for name in parts[0]}
        told = self.layers[problem.names[0]]
        codes = Codes(**joined, scheme=problem.scheme)
        return Solution(codes, told.damping or None, told.damping_escalations, told.instead)


class _Objective:
    """What the training makes less: the divergence from the original, KL(original ‖ model), nats; without an original
    the negative log-likelihood. As `models.train.scoring.Objective`.

    held: closes the original, which is loaded when it is first asked.
    """

    def __init__(self, original: Frame | None, held: ExitStack) -> None:
        self._frame, self._held = original, held
        self._original: Any = None

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor:
        model.eval()  # no dropout: what is learned is to make up for the rounding alone
        if self._frame is None:
            return learned_losses(model, batch, packed=packed)
        if self._original is None:
            source = Frame(self._frame.source, self._frame.dtype, self._frame.device)
            self._original = self._held.enter_context(source.whole())
        with torch.no_grad():
            wanted = torch.log_softmax(learned_logits(self._original, batch, packed=packed).float(), dim=-1)
            chances = wanted.exp()
            entropies = -wanted.mul_(chances).sum(dim=-1)
            del wanted
        logits = learned_logits(model, batch, packed=packed)
        return F.cross_entropy(logits.float(), chances, reduction="none") - entropies


def _learners(frame: Frame, step: QAT, begun: QuantizedModel) -> dict[str, Learner]:
    """Puts what learns in the place of every linear that is quantized, before weights are loaded; by their names."""
    learners: dict[str, Learner] = {}
    for index in range(frame.count):
        block = frame.skeleton(index)
        for site in frame.sites(index):
            if site.name not in begun.sites:
                continue
            linear, codes = frame.module(site), cast(Codes, begun.codes(site.name))
            codes = Codes(**{part: one.to(frame.device) for part, one in codes.tensors().items()}, scheme=codes.scheme)
            bias = cast(nn.Parameter | None, getattr(linear, "bias", None))
            learner = Learner(codes, bias, frame.dtype, frame.source.dtype, weights=step.train == "weights")
            frame.put(site, learner)
            learners[site.name] = learner
        if step.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return learners


def _written(begun: QuantizedModel, learners: Mapping[str, Learner], frame: Frame, directory: Path) -> QuantizedModel:
    """One file a block, as the engine writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(frame.count):
        names = [site.name for site in frame.sites(index) if site.name in learners]
        codes = {name: learners[name].learned() for name in names}
        save_file(dict(tensors_of(codes)), block_file(directory, index))
    return replace(begun, directory=directory)


def _examples(ids: Tensor) -> Examples:
    """Sequences (n, T) of which all is learned."""
    count, length = ids.shape
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :1] = False
    return Examples(ids.flatten().int(), scored.flatten(), torch.arange(count + 1) * length)
