"""The base of adapters where GPTQ rounds it before they are trained: made on their training examples, kept on disk."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.certifying.running import Sample
from models.job import Inputs, compress_step
from models.measuring.evaluation import measure
from models.progress import Notify
from models.resources import Clock, return_free_memory
from models.streaming import engine
from models.streaming.teamwork import frames_of
from models.texts.data import LEAST_TOKENS, Windows, text_of
from models.texts.material import few_tokens
from models.train.counting import work_of
from models.train.examples import Examples
from models.train.prepare import Prepared
from models.weights.quantized import QuantizedModel
from models.work import ahead
from squeeze.errors import DataUnusable
from squeeze.objects import Stage
from squeeze.reports.parts import Quality, Text
from squeeze.reports.report import Block
from squeeze.specs.bases import base_of
from squeeze.texts.records import DATA

BASE = "base"  # in the work directory, its codes


@dataclass(frozen=True)
class Base:
    """codes: of the linears. blocks: the story of each. calibration: what they were rounded on. quality: against the
    model as it came, where that was asked for. warnings: what the user should know of it. sample: held-out examples
    with its losses, once they are known.
    """

    codes: QuantizedModel
    blocks: list[Block]
    calibration: Text
    quality: Quality | None
    warnings: list[str]
    sample: Sample | None = None

    def with_sample(self, sample: Sample) -> "Base":
        return replace(self, sample=sample)


def rounded_base(prepared: Prepared, inputs: Inputs, clock: Clock, notify: Notify) -> Base | None:
    """Rounds the source's linears, resuming where an earlier attempt stopped; None where the step has no such base.

    The codes are the same bits in every attempt. Several processes share the examples, and all of them get the codes;
    the quality is the leader's. Raises DataUnusable where the examples are too short to round on.
    """
    spec, source, team = prepared.spec, prepared.source, prepared.processes.team
    beforehand = base_of(source.shape(), spec, prepared.step)
    if beforehand is None:
        return None
    step = compress_step(beforehand)
    if work := work_of(prepared, prepared.plan(packed=prepared.step.packing), spec):
        notify.expect(ahead(work, source, spec, ()))
    calibration = _sequences(prepared.split.train, spec.data.samples, prepared.length, prepared.seed)
    if calibration.shape[1] < LEAST_TOKENS:
        raise DataUnusable(
            f"the training examples have {calibration.numel()} tokens; to round the base on them takes at least "
            f"{LEAST_TOKENS}",
            param=DATA,
        )
    told = text_of(calibration, prepared.split.data.origin, generic=False)
    windows = _windows(prepared)
    frames = frames_of(source, step, prepared.device)
    with clock.stage("compressing"):
        done = engine.quantize(
            frames.result,
            step,
            calibration,
            windows,
            inputs.work / BASE,
            f"{prepared.mark} {told.sha256} {windows.text.sha256 if windows else None}",
            notify,
            inputs.snapshot_seconds,
            memory_bytes=inputs.activation_bytes,
            team=team,
        )
    quality = None
    if windows is not None and team.leads:  # who alone has all of what the blocks left
        with clock.stage("evaluating"):
            notify.stage(Stage.evaluating)
            streams = done.activations.original, done.activations.compressed
            quality = measure(frames.result, windows, *streams, notify).quality
    done.activations.release()
    del frames
    return_free_memory()
    widest = max(site.columns for site in done.model.sites.values())
    warnings = few_tokens(told.sequences, told.sequence_length, widest)
    return Base(done.model, done.blocks, told, quality, warnings)


def _sequences(examples: Examples, count: int, length: int, seed: int | None) -> Tensor:
    """At most so many sequences of so many tokens, of examples one behind the other: (n, T) int64; shorter, where
    there are fewer tokens. seed: of their order; None: as they come.
    """
    order = range(len(examples)) if seed is None else _mixed(len(examples), seed)
    pieces, tokens = [], 0
    for number in order:
        if tokens >= count * length:
            break
        ids, _ = examples.one(number)
        pieces.append(ids)
        tokens += len(ids)
    length = min(length, tokens)
    count = min(count, tokens // length)
    return torch.cat(pieces)[: count * length].view(count, length).long()


def _mixed(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()


def _windows(prepared: Prepared) -> Windows | None:
    """Of the held-out examples, whose tokens are all scored but for the first of each window; None where they have next
    to none, or nobody asks.
    """
    evaluation = prepared.spec.evaluation
    if not (evaluation.perplexity or evaluation.divergence):
        return None
    ids = _sequences(prepared.held_out, prepared.spec.evaluation.samples, prepared.length, None)
    if ids.shape[1] < LEAST_TOKENS:
        return None
    origin = prepared.split.data.held_out_origin
    return Windows(ids, (1,) * len(ids), ids.shape[1], text_of(ids, origin, generic=False))
