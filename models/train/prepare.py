"""What a step that trains needs before its first batch: examples, what is to learn, batches; checked as it is found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.distill.student import refuse_unteachable, student_of
from models.distill.vocabulary import refuse_foreign, shared_vocabulary
from models.files.architectures import architecture_of
from models.files.checkpoint import SourceModel, open_or_convert
from models.finetune import full, head
from models.fingerprint import training_fingerprint
from models.formats.directory import refuse_broken_companions
from models.job import Inputs
from models.progress import Notify, Silent
from models.prune.factors.handed import HandedFactors
from models.resources import Clock
from models.streaming.frame import Frame
from models.texts.data import LEAST_TOKENS
from models.train import factors
from models.train.choices import Choices, choose_length, choose_rest
from models.train.domains import evenly
from models.train.examples import Examples, Split
from models.train.packing import Plan, rows_apart, rows_of, steps_for
from models.train.processes import ALONE, Processes
from models.train.scoring import own, packs
from models.train.task import Task
from models.train.texts import examples_of
from models.train.whole import load_whole
from models.train.zeros import pruned_names, zeros_of
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import DataUnusable, ModelMalformed, SpecInvalid
from squeeze.specs.choosing import LENGTH_MOST, Choice, settled
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.descent import Precision
from squeeze.steps.distillation import Distill
from squeeze.steps.distillation import Sequence as Written
from squeeze.steps.finetuning import Adapters, Finetune, Head, QLoRA, VirtualTokens
from squeeze.steps.movement import Movement
from squeeze.steps.sharding import refuse_without_library
from squeeze.steps.training import Train
from squeeze.texts.records import DATA

TRAINING = "train"  # in the work directory, what one keeps
TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """source: the model that learns, as it came. sites: the linears that get something to learn. held_out: the examples
    that the loss is measured on. length: of a sequence, in tokens. vocabulary: of the model, as far as a teacher shares
    it. mark: of all that decides the result. teacher: of a distillation, the job's own model. student: of one, who
    learns, in words. comparable: whether both have one vocabulary. processes: that share the training. spec, step: of
    the job, with numbers for every `auto`; choices: what these came to, of a step that may say so. factors: which
    learn in the place of linears, where an earlier step wrote them so.
    """

    step: Train
    spec: JobSpec
    seed: int
    source: SourceModel
    sites: list[Site]
    split: Split
    held_out: Examples
    length: int
    precision: str
    device: torch.device
    vocabulary: int
    mark: str
    teacher: SourceModel | None = None
    student: str = ""
    comparable: bool = True
    processes: Processes = ALONE
    choices: Choices | None = None
    factors: HandedFactors | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that don't learn, and of the computation."""
        return TYPES[self.precision]

    @property
    def first_device(self) -> torch.device:
        """Where the model is before each of several processes takes its part: it need not fit on the device."""
        return torch.device("cpu") if self.processes.sharded else self.device

    def rechosen(self, asked: JobSpec, step: Train) -> "Prepared":
        """With what `choices` says now. asked: the job as it came. step: as it came."""
        assert self.choices is not None and isinstance(step, Finetune), "only these choose"
        spec, chosen = settled(asked, step, self.choices.made)
        return replace(self, spec=spec, step=chosen)

    def load(self, path: Path, device: torch.device | None = None) -> Any:
        """A model directory's whole model, nothing of it to learn. device: left out, that of the training."""
        if isinstance(self.step, Head):
            return head.load(path, self.labels, self.dtype, device or self.device)
        return load_whole(path, self.dtype, device or self.device)

    def put_factors(self, model: Any) -> None:
        """In the place of a whole model's linears."""
        if self.factors is not None:
            factors.put(model, self.factors.of(self.source))

    @property
    def labels(self) -> list[str]:
        """By their numbers; none where no labels are learned."""
        return [*(self.split.data.labels or ())]

    @property
    def blocks(self) -> str:
        """Path of the list of decoder blocks."""
        return architecture_of(self.source.config).blocks

    def share(self, model: Any) -> None:
        """Leaves this process its part of the weights, where several are to hold a part each."""
        blocks = own(model).get_submodule(self.blocks)
        self.processes.shard(model, list(blocks), self.step, self.precision)

    def plan(self, *, packed: bool) -> Plan:
        step, lengths = self.step, self.split.train.lengths
        rows = rows_apart(self.split.train, self.length, packed=packed)
        steps = step.steps or steps_for(
            rows, lengths, step.sequences, self.seed, epochs=step.epochs, tokens=step.tokens
        )
        return Plan(rows, step.sequences, self.seed, steps)

    def task(self, model: Any, *, packed: bool) -> Task:
        return Task(
            model=model,
            step=self.step,
            examples=self.split.train,
            plan=self.plan(packed=packed),
            held_out=self.held_out,
            held_out_rows=rows_of(self.held_out.lengths, self.length, packed=packed),
            packed=packed,
            device=self.device,
            processes=self.processes,
        )


def method_of(step: Train) -> Any:
    """The module that says what of a model learns in a step; of a distillation's student all does."""
    return full if isinstance(step, Distill) else import_module(f"models.{step.kind}.{step.method}")


def refuse_untrainable(step: Train, frame: Frame) -> int:
    """The number of linears that get something to learn; raises where there are none, from the config alone."""
    if isinstance(step, Distill):
        refuse_unteachable(step, frame)
    sites, ahead = method_of(step).sites_of(frame, step), _virtual_tokens(step)
    if not sites and not ahead and not isinstance(step, Head):
        raise ModelMalformed("no linear layer of the decoder blocks can be trained", param="target_modules")
    if frame.max_positions is not None and frame.max_positions - ahead < LEAST_TOKENS:
        beside = f" beside {ahead} virtual tokens" if ahead else ""
        raise DataUnusable(f"the model has {frame.max_positions} positions; at least {LEAST_TOKENS} are needed{beside}")
    return len(sites)


def prepare(
    inputs: Inputs,
    step: Train,
    notify: Notify | None = None,
    chosen: Sequence[Choice] | None = None,
    clock: Clock | None = None,
) -> Prepared:
    """Reads the examples, and looks at the model's headers. Raises what is wrong with either.

    chosen: by the process that leads, where this one follows. clock: of the stage that this is a part of.
    """
    refuse_without_library(step.sharding)
    asked, spec, teacher, student, shared, comparable = step, inputs.spec, None, "", None, True
    source = open_or_convert(inputs.model, inputs.work / "source")
    refuse_broken_companions(source)
    if isinstance(step, Distill):
        teacher, (source, student) = source, student_of(inputs, step, source)
        if inputs.student is not None:
            foreign_too = isinstance(step, Written)
            shared = (shared_vocabulary if foreign_too else partial(refuse_foreign, step))(teacher.path, source.path)
            comparable = shared is not None
    frame = Frame(source, torch.float32, torch.device("cpu"))
    frames = [frame] if teacher is None else [frame, Frame(teacher, torch.float32, torch.device("cpu"))]
    for one in frames:
        one.refuse_misfits()
    ahead = _virtual_tokens(step)
    most = min([LENGTH_MOST, *(one.max_positions - ahead for one in frames if one.max_positions)])
    device = torch.device(inputs.device)
    precision = resolved(step.precision, device)

    def read(length: int) -> Split:
        return examples_of(
            inputs, step, teacher, source, length, TYPES[precision], notify or Silent(), clock or Clock()
        )

    choices = Choices.of(spec, step, inputs.work / TRAINING, chosen) if isinstance(step, Finetune) else None
    spec, step, split, length = _settled(choices, spec, step, source, most, device, read)
    for choice in choices.made if choices is not None else ():
        (notify or Silent()).event("info", f"{choice.name} {choice.value:g}: {choice.why}", **choice.model_dump())
    if length < spec.data.length:
        beside = f" beside {ahead} virtual tokens" if ahead else ""
        split.warnings.append(f"sequence_length {spec.data.length} was cut to the model's {length} positions{beside}")
    vocabulary = int(frame.model.config.vocab_size)
    if len(split.data.labels or ()) > vocabulary:
        raise DataUnusable(f"there are more labels than the {vocabulary:,} tokens that the model knows", param=DATA)
    _refuse_foreign_ids(split, vocabulary)
    return Prepared(
        step=step,
        spec=spec,
        seed=spec.seed,
        source=source,
        sites=method_of(step).sites_of(frame, step),
        split=split,
        held_out=_measured(split, spec.seed, spec.evaluation.samples * length),
        length=length,
        precision=precision,
        device=device,
        vocabulary=min(vocabulary, shared or vocabulary),
        mark=training_fingerprint(
            asked,
            spec.seed,
            inputs.identity,
            inputs.device,
            teacher or source,
            split.data,
            length,
            student=None if inputs.student is None else (source, inputs.student_identity),
            samples=spec.data.samples if isinstance(step, QLoRA) and step.base == "gptq" else None,
        ),
        teacher=teacher,
        student=student,
        comparable=comparable,
        choices=choices,
        factors=inputs.factors,
    )


def begun(prepared: Prepared, base: QuantizedModel | None = None) -> tuple[Task, dict[str, Tensor], list[str]]:
    """(the training before its first step, adapters as they begin, warnings). base: what they stand beside, where it
    was rounded before.
    """
    step, warnings, processes = prepared.step, list(prepared.split.warnings), prepared.processes
    method = method_of(step)
    with processes.loading():
        if isinstance(step, QLoRA):
            model = method.load(prepared.source, step, prepared.dtype, prepared.device, base)
        else:
            model = prepared.load(prepared.source.path, prepared.first_device)
            prepared.put_factors(model)
        torch.manual_seed(prepared.seed)
        model = method.finetune(model, step, [site.name for site in prepared.sites])
        if isinstance(step, QLoRA) and step.init == "loftq":
            method.start_at_what_is_lost(model, step, prepared.source, prepared.sites)
        initial = method.adapter_of(model) if isinstance(step, Adapters) else {}
        if step.activation_checkpointing:
            own(model).activation_checkpointing_enable({"use_reentrant": False})
        names = [] if isinstance(step, Adapters) else pruned_names(model, prepared.blocks)
        prepared.share(model)
    if names and processes.zero is not None:
        raise SpecInvalid(
            f"the model was pruned, and with {step.sharding} nobody sees its gradients: set sharding to ddp or full",
            param="sharding",
        )
    packs_here = step.packing and packs(model, prepared.device, int(model.config.vocab_size))
    packed = processes.leader_says(packs_here)
    if step.packing and not packed:
        warnings.append(
            f"examples of a {prepared.source.config['model_type']} would see each other in one sequence: each has one "
            "of its own"
        )
    task = prepared.task(model, packed=packed)
    if isinstance(step, Movement):
        scores = method.prune(model, step, prepared.sites, task.plan.steps)
        task = replace(task, beside=scores, masks=scores)
    return replace(task, zeros=zeros_of(model, names)), initial, warnings


def _settled(
    choices: Choices | None,
    spec: JobSpec,
    step: Train,
    source: SourceModel,
    most: int,
    device: torch.device,
    read: Callable[[int], Split],
) -> tuple[JobSpec, Train, Split, int]:
    """(the job, its step, both with numbers for every `auto`, the examples, the length of a sequence). most: tokens
    that a sequence may have. read: examples of a length.
    """
    if choices is None or not isinstance(step, Finetune):
        length = min(spec.data.length, most)
        return spec, step, read(length), length
    length = choose_length(choices, spec, lambda: read(most).train.lengths, most)
    split = read(length)
    return *choose_rest(choices, spec, step, source, split.data.tokens, length, device), split, length


def _virtual_tokens(step: Train) -> int:
    """That stand before every sequence, and take positions too."""
    return step.virtual_tokens if isinstance(step, VirtualTokens) else 0


def resolved(precision: Precision, device: torch.device) -> str:
    """What `auto` means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _measured(split: Split, seed: int, tokens: int) -> Examples:
    """What of the held-out examples the loss is measured on, of so many tokens together: the first of them, or as many
    of each domain.
    """
    if split.held_out.domains is not None:
        return evenly(split.held_out, tokens)
    return _first(_mixed(split, seed), tokens)


def _mixed(split: Split, seed: int) -> Examples:
    """What is held out; with labels in an order that the seed draws, since files are often sorted by label."""
    examples = split.held_out
    if split.data.labels is None:
        return examples
    dice = torch.Generator().manual_seed(seed % 2**63)
    return examples.chosen(torch.randperm(len(examples), generator=dice).tolist())


def _first(examples: Examples, tokens: int) -> Examples:
    """The first examples, of so many tokens together; at least one."""
    count = max(1, int((examples.starts[1:] <= tokens).sum()))
    end = int(examples.starts[count])
    return Examples(examples.ids[:end], examples.scored[:end], examples.starts[: count + 1])


def _refuse_foreign_ids(split: Split, vocabulary: int) -> None:
    highest = max(int(side.ids.max()) for side in (split.train, split.held_out))
    if highest >= vocabulary:
        raise ModelMalformed(
            f"the tokenizer gives id {highest}, but the model knows only {vocabulary} tokens; tokenizer and weights "
            "are not of one model"
        )
