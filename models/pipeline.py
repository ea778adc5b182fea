"""A job's way through this room: a model directory and a spec in, model directories and a report out.

Where a job prunes and trains in turn, round after round (`models.rounds`), each of them so:
loading -> merging, where a step merges, or loading -> calibrating -> compressing, where one makes a smaller model; of
what that made, or of the source, loading -> training, where a step trains;
of what that made, where a step zeroes weights or quantizes: loading -> calibrating -> compressing (evaluating in the
same pass) -> evaluating -> exporting -> certifying; where one does each, all but the last twice
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.bits.allocation import allots, mixed
from models.files.architectures import architecture_of
from models.files.checkpoint import SourceModel, read_config
from models.files.disk import disk_faults
from models.formats import layout
from models.job import (
    Inputs,
    Outcome,
    compress_step,
    merging_step,
    param_of,
    params_named,
    slimming_step,
    training_step,
)
from models.merge import entries
from models.merge import job as merge
from models.progress import Notify
from models.prune import job as prune
from models.prune import movement
from models.prune.factors import job as factored_job
from models.prune.slimming import smaller
from models.quantize.job import run_compression
from models.quantize.kv_cache import refuse_unknown_attention
from models.resources import Clock
from models.rounds import counted_from, run_in_rounds
from models.streaming import engine
from models.streaming.experts import refuse_torn
from models.streaming.frame import Frame
from models.streaming.team import SOLO, Team
from models.streaming.teamwork import follow as follow_quantizing
from models.texts.material import refuse_too_large_for_self
from models.train import rounded
from models.train.job import added, for_what_follows, run_training, trained
from models.train.job import follow as follow_training
from models.train.optimizers import refuse_without_gpu
from models.train.prepare import refuse_untrainable
from squeeze.errors import FormatUnfit, ModelMalformed, SpecInvalid
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Report
from squeeze.shapes.architectures import HELD_BY, refuse_unrotatable
from squeeze.specs.chains import factored_before
from squeeze.specs.formats import FACTORED, OF_ANY_FAMILY, PLAIN, candidates
from squeeze.specs.job_spec import JobSpec
from squeeze.specs.rounds import rounds_of
from squeeze.steps.compressing import Compress
from squeeze.steps.distillation import Distill
from squeeze.steps.factoring import SVD, Sides, budget_of
from squeeze.steps.merging import Entry, Merge
from squeeze.steps.movement import Movement
from squeeze.steps.quantization import QAT, Grouped, Quantize
from squeeze.steps.slimming import Slim
from squeeze.steps.sparsifying import Sparsify, refuse_torn_pattern
from squeeze.steps.training import Train


@dataclass(frozen=True)
class Facts:
    """What config.json alone tells of a model: its family, the number of its blocks, the linears to compress."""

    model_type: str
    blocks: int
    linears: int


def check(spec: JobSpec, model: Path) -> Facts:
    """Refuses what can't work, from `config.json` alone, before any weight is fetched."""
    config = read_config(model)
    frame = Frame(SourceModel(model, config, {}, architecture_of(config)), torch.float32, torch.device("cpu"))
    facts = Facts(config["model_type"], frame.count, 0)
    for part in rounds_of(spec):
        slimming = slimming_step(part.spec)
        with counted_from(part.first):
            if slimming is not None:
                with params_named(part.spec, slimming):
                    smaller.refuse(slimming, frame)
                    frame = smaller.judged(slimming, frame)
            facts = _check_round(part.spec, config, frame)
            if any(isinstance(step, Train) for step in factored_before(spec.steps)):
                _refuse_factored_experts(part.spec, frame)
        if any(isinstance(step, Distill) and step.student.named for step in part.spec.steps):
            return facts  # the next round goes on with another model
    return facts


def _check_round(spec: JobSpec, config: dict[str, Any], frame: Frame) -> Facts:
    """frame: of what the first of its steps made, where that makes a smaller model."""
    training = training_step(spec)
    if training is not None:
        with params_named(spec, training):
            count = refuse_untrainable(training, frame)
            if isinstance(training, Movement):
                sites = movement.sites_of(frame, training)
                refuse_torn_pattern(training, {site.name: site.columns for site in sites})
        if training is spec.steps[-1]:
            _refuse_unholdable(config["model_type"], [name for name in spec.formats if name in FACTORED])
        if training is spec.steps[-1] or _taught(spec):  # another model goes on to the next step
            return Facts(config["model_type"], frame.count, count)
    if isinstance(spec.steps[-1], Merge | Slim):
        return Facts(config["model_type"], frame.count, sum(len(frame.sites(n)) for n in range(frame.count)))
    return _check_compressible(spec, config, frame)


def check_entry(base: Path, model: str, entry: Entry, directory: Path) -> None:
    """As `check`, of what is merged into the job's own model, which is in the directory `base` and called `model`."""
    entries.check_entry(base, model, entry, directory)


def _taught(spec: JobSpec) -> bool:
    return any(name.endswith(".student.model") for name in spec.models)


def check_student(spec: JobSpec, model: Path) -> Facts:
    """As `check`, of the model that learns from the job's own and goes on to the next step."""
    config = read_config(model)
    frame = Frame(SourceModel(model, config, {}, architecture_of(config)), torch.float32, torch.device("cpu"))
    if any(isinstance(step, Train) for step in factored_before(spec.steps)):
        _refuse_factored_experts(spec, frame)
    if isinstance(spec.steps[-1], Compress):
        return _check_compressible(spec, config, frame)
    return Facts(config["model_type"], frame.count, sum(len(frame.sites(n)) for n in range(frame.count)))


def _check_compressible(spec: JobSpec, config: dict[str, Any], frame: Frame) -> Facts:
    for pruning in spec.compressing:
        if isinstance(pruning, Sparsify | SVD) or (isinstance(pruning, Quantize) and pruning.zeroed):
            _refuse_unprunable(spec, pruning, frame)
    step = compress_step(spec)
    refuse_too_large_for_self(spec, step, frame)
    if isinstance(step, QAT):
        rounded.refuse_too_large_to_train(spec, step, frame)
    if step.rotates:
        refuse_unrotatable(config["model_type"], param_of(spec, "rotation"))
    schemes = engine.schemes_of(frame, step)
    sites = [site for n in range(frame.count) for site in frame.sites(n) if site.name in schemes]
    if not sites:
        raise ModelMalformed("`ignore` leaves no linear layer to compress", param=param_of(spec, "ignore"))
    if isinstance(step, Grouped) and allots(step):
        schemes = mixed(schemes, candidates(step, spec.formats))
    _refuse_unholdable(config["model_type"], spec.formats)
    for name in spec.formats:
        with params_named(spec):
            layout(name).refuse(sites, schemes)
            if step.scales_cache:
                refuse_unknown_attention(frame)
            # gguf stacks one linear of a layer's experts at a time, and says itself where it can't.
            if name not in (*PLAIN, "gguf"):
                refuse_torn([linears for n in range(frame.count) for linears in frame.experts(n).values()], schemes)
    return Facts(config["model_type"], frame.count, len(sites))


def _refuse_factored_experts(spec: JobSpec, frame: Frame) -> None:
    """Where a step is to learn in the place of a round's factors: transformers trains all experts of a layer as one."""
    step = next((step for step in spec.steps if isinstance(step, SVD)), None)
    names = engine.schemes_of(frame, step) if step is not None else {}
    experts = {name for n in range(frame.count) for linears in frame.experts(n).values() for name in linears}
    if step is not None and experts & set(names):
        raise SpecInvalid(
            "factors of experts can't learn, since a training has all experts of a layer in one tensor: leave them out "
            "with `ignore`, for example *.experts.*",
            param=param_of(spec, "ignore", step),
        )


def _refuse_unholdable(model_type: str, formats: Sequence[Format]) -> None:
    held = HELD_BY[model_type]
    for name in formats:
        if name not in (*held, *OF_ANY_FAMILY):
            raise FormatUnfit(f"{name} can't hold {model_type} models; {', '.join(held)} can", param="formats")


def _refuse_unprunable(spec: JobSpec, step: Quantize | Sparsify | SVD, frame: Frame) -> None:
    names = engine.schemes_of(frame, step)
    sites = [site for n in range(frame.count) for site in frame.sites(n) if site.name in names]
    if not sites:
        raise ModelMalformed("`ignore` leaves no linear layer to prune", param=param_of(spec, "ignore", step))
    with params_named(spec, step):
        if isinstance(step, SVD):
            budget_of(step, frame.parameters, {site.name: Sides(site.rows, site.columns) for site in sites})
        else:
            refuse_torn_pattern(step, {site.name: site.columns for site in sites})
        refuse_too_large_for_self(spec, step, frame)


def run(inputs: Inputs, notify: Notify, team: Team = SOLO) -> Outcome:
    """Runs all steps of a job. Raises a SqueezeError that says what to do; anything else is a bug.

    team: the leader's; the others are in `follow`.
    """
    with disk_faults():
        return _run(inputs, notify, team)


def follow(spec: JobSpec, team: Team) -> None:
    """What another process of the team than its leader does: its share of each step, as the leader comes to it."""
    for part in rounds_of(spec):
        for step in part.spec.steps:
            if isinstance(step, Train):
                follow_training(team, part.spec, step)
            elif isinstance(step, Compress):
                follow_quantizing(team, step)


def _run(inputs: Inputs, notify: Notify, team: Team) -> Outcome:
    notify.stage(Stage.planning)
    check(inputs.spec, inputs.model)
    if inputs.student is not None:
        check_student(inputs.spec, inputs.student)
    rounds = rounds_of(inputs.spec)
    if len(rounds) == 1:
        return _run_round(inputs, notify, team)
    return run_in_rounds(inputs, rounds, lambda one, told: _run_round(one, told, team), notify)


def _run_round(inputs: Inputs, notify: Notify, team: Team) -> Outcome:
    torch.manual_seed(inputs.spec.seed)
    merging, training, clock = merging_step(inputs.spec), training_step(inputs.spec), Clock()
    slimming = slimming_step(inputs.spec)
    if training is not None:
        with params_named(inputs.spec, training):
            refuse_without_gpu(training, torch.device(inputs.device))
    if slimming is not None:
        if len(inputs.spec.steps) == 1:
            return smaller.run_slimming(inputs, slimming, notify)
        made = smaller.slimmed(inputs, slimming, clock, notify)
        onwards = smaller.for_what_follows(inputs, made)
        return _after_merging(
            onwards, training, clock, notify, team, lambda report: smaller.added(report, inputs, made)
        )
    if merging is None:
        return _after_merging(inputs, training, clock, notify, team)
    if len(inputs.spec.steps) == 1:
        return merge.run_merging(inputs, merging, notify)
    before = merge.merged(inputs, merging, clock, notify)
    following = merge.for_what_follows(inputs, before)
    return _after_merging(following, training, clock, notify, team, lambda report: merge.added(report, inputs, before))


def _after_merging(
    inputs: Inputs,
    training: Train | None,
    clock: Clock,
    notify: Notify,
    team: Team,
    completed: Callable[[Report], Report] = lambda report: report,
) -> Outcome:
    """The other steps. completed: adds to the report what came before."""
    if training is None:
        return _compressing(inputs, clock, notify, team, completed)
    with params_named(inputs.spec, training):
        if training is inputs.spec.steps[-1]:
            return run_training(inputs, training, clock, notify, team, completed)
        done = trained(inputs, training, inputs.work / "adapter", inputs.work / "whole", clock, notify, team)
    following = for_what_follows(inputs, done)
    return _compressing(following, clock, notify, team, lambda report: completed(added(report, inputs, done)))


def _compressing(
    inputs: Inputs, clock: Clock, notify: Notify, team: Team, completed: Callable[[Report], Report]
) -> Outcome:
    """The steps that go through the model block by block: the one that quantizes, if two."""
    first = inputs.spec.compressing[0]
    if first is not inputs.spec.steps[-1] and isinstance(first, SVD):
        factors = factored_job.factored(inputs, first, clock, notify, team)
        onwards = factored_job.for_what_follows(inputs, factors)
        return run_compression(
            onwards, clock, notify, team, lambda report: completed(factored_job.added(report, inputs, factors))
        )
    if not isinstance(first, Sparsify) or first is inputs.spec.steps[-1]:
        return run_compression(inputs, clock, notify, team, completed)
    done = prune.pruned(inputs, first, clock, notify, team)
    following = prune.for_what_follows(inputs, done)
    return run_compression(following, clock, notify, team, lambda report: completed(prune.added(report, inputs, done)))
