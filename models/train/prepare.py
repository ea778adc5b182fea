"""What a step that trains needs before its first batch: examples, what is to learn, batches; checked as it is found."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from models.checkpoint import SourceModel, open_or_convert
from models.data import CHARACTERS_PER_TOKEN, EVALUATION_SEED, GENERIC_ORIGIN, LEAST_TOKENS, generic_passages
from models.disk import write_whole
from models.distill.student import refuse_unteachable, student_of
from models.finetune import full
from models.fingerprint import training_fingerprint
from models.formats.directory import refuse_broken_companions
from models.frame import Frame
from models.job import Inputs
from models.material import read_tokenizer
from models.quantized import Site
from models.text import Split as Side
from models.train.examples import Examples, Split, read_examples
from models.train.loop import Task
from models.train.packing import Plan, rows_of, steps_for
from models.train.scoring import own, packs
from squeeze.distillation import Distill
from squeeze.errors import DataUnusable, ModelMalformed
from squeeze.training import Adapters, Precision, Train, VirtualTokens

EVERYTHING = 1 << 62  # characters
TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prepared:
    """source: the model that learns, as it came. sites: the linears that get something to learn. held_out: the examples
    that the loss is measured on. length: of a sequence, in tokens. vocabulary: of the model. mark: of all that decides
    the result. teacher: of a distillation, the job's own model. student: of one, who learns, in words.
    """

    step: Train
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

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that don't learn, and of the computation."""
        return TYPES[self.precision]

    def load(self, path: Path) -> Any:
        """A model directory's whole model on the device, nothing of it to learn."""
        transformers_logging.disable_progress_bar()  # a worker's log is no terminal
        model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, trust_remote_code=False)
        model.config.use_cache = False
        return model.to(self.device).eval().requires_grad_(False)

    def task(self, model: Any, *, packed: bool) -> Task:
        step, examples = self.step, self.split.train
        rows = rows_of(examples.lengths, self.length, packed=packed)
        steps = step.steps or steps_for(
            rows, examples.lengths, step.batch_size, self.seed, epochs=step.epochs, tokens=step.tokens
        )
        return Task(
            model=model,
            step=step,
            examples=examples,
            plan=Plan(rows, step.batch_size, self.seed, steps),
            held_out=self.held_out,
            held_out_rows=rows_of(self.held_out.lengths, self.length, packed=packed),
            packed=packed,
            device=self.device,
        )


def method_of(step: Train) -> Any:
    """The module that says what of a model learns in a step; of a distillation's student all does."""
    return full if isinstance(step, Distill) else import_module(f"models.{step.kind}.{step.method}")


def refuse_untrainable(step: Train, frame: Frame) -> int:
    """The number of linears that get something to learn; raises where there are none, from the config alone."""
    if isinstance(step, Distill):
        refuse_unteachable(step, frame)
    sites, ahead = method_of(step).sites_of(frame, step), _virtual_tokens(step)
    if not sites and not ahead:
        raise ModelMalformed("no linear layer of the decoder blocks can be trained", param="target_modules")
    if frame.max_positions is not None and frame.max_positions - ahead < LEAST_TOKENS:
        beside = f" beside {ahead} virtual tokens" if ahead else ""
        raise DataUnusable(f"the model has {frame.max_positions} positions; at least {LEAST_TOKENS} are needed{beside}")
    return len(sites)


def prepare(inputs: Inputs, step: Train) -> Prepared:
    """Reads the examples, and looks at the model's headers. Raises what is wrong with either."""
    spec, teacher, student = inputs.spec, None, ""
    source = open_or_convert(inputs.model, inputs.work / "source")
    refuse_broken_companions(source)
    if isinstance(step, Distill):
        teacher, (source, student) = source, student_of(step, source, inputs.work)
    frame = Frame(source, torch.float32, torch.device("cpu"))
    frame.refuse_misfits()
    ahead = _virtual_tokens(step)
    length = min(spec.data.sequence_length, (frame.max_positions or spec.data.sequence_length + ahead) - ahead)
    split = _examples(inputs, step, source.path, length)
    if length < spec.data.sequence_length:
        beside = f" beside {ahead} virtual tokens" if ahead else ""
        split.warnings.append(
            f"sequence_length {spec.data.sequence_length} was cut to the model's {length} positions{beside}"
        )
    vocabulary = int(frame.model.config.vocab_size)
    _refuse_foreign_ids(split, vocabulary)
    device = torch.device(inputs.device)
    return Prepared(
        step=step,
        seed=spec.seed,
        source=source,
        sites=method_of(step).sites_of(frame, step),
        split=split,
        held_out=_first(split.held_out, spec.evaluation.samples * length),
        length=length,
        precision=resolved(step.precision, device),
        device=device,
        vocabulary=vocabulary,
        mark=training_fingerprint(
            step, spec.seed, inputs.revision, inputs.device, teacher or source, split.data, length
        ),
        teacher=teacher,
        student=student,
    )


def begun(prepared: Prepared) -> tuple[Task, dict[str, Tensor], list[str]]:
    """(the training before its first step, adapters as they begin, warnings)."""
    step, warnings = prepared.step, list(prepared.split.warnings)
    model = prepared.load(prepared.source.path)
    torch.manual_seed(prepared.seed)
    model = method_of(step).finetune(model, step, [site.name for site in prepared.sites])
    packed = step.packing and packs(model, prepared.device, int(model.config.vocab_size))
    if step.packing and not packed:
        warnings.append(
            f"examples of a {prepared.source.config['model_type']} would see each other in one sequence: each has one "
            "of its own"
        )
    if step.activation_checkpointing:
        own(model).activation_checkpointing_enable({"use_reentrant": False})
    initial = method_of(step).adapter_of(model) if isinstance(step, Adapters) else {}
    return prepared.task(model, packed=packed), initial, warnings


def _virtual_tokens(step: Train) -> int:
    """That stand before every sequence, and take positions too."""
    return step.virtual_tokens if isinstance(step, VirtualTokens) else 0


def _examples(inputs: Inputs, step: Train, model: Path, length: int) -> Split:
    """What is trained on and measured on; of no text of the user's the generic one, as much of it as is looked at."""
    spec, text, held_out = inputs.spec, inputs.calibration_text, inputs.evaluation_text
    origin = inputs.calibration_origin or spec.data.source or GENERIC_ORIGIN
    generic = text is None
    if text is None:
        text = _generic(inputs.work / "generic.jsonl", "train", tokens_of(step, length), length, spec.seed)
    if held_out is None and generic:
        wanted = spec.evaluation.samples * length
        held_out = _generic(inputs.work / "generic-held-out.jsonl", "held_out", wanted, length, EVALUATION_SEED)
    split = read_examples(
        read_tokenizer(model),
        text,
        held_out,
        length,
        origins=(origin, inputs.evaluation_origin or spec.evaluation.source or origin),
        columns=(spec.data.column, spec.evaluation.column),
    )
    if generic:
        split.warnings.append(
            f"learned from generic text ({GENERIC_ORIGIN}): name text like your own as data.source for a student that "
            "is to do your work"
        )
    return split


def tokens_of(step: Train, length: int) -> int | None:
    """That a training looks at, at most; None where epochs say it."""
    return step.tokens if step.steps is None else step.steps * step.batch_size * length


def _generic(file: Path, side: Side, tokens: int | None, length: int, seed: int) -> Path:
    """A part of the generic text as records."""
    characters = EVERYTHING if tokens is None else tokens * CHARACTERS_PER_TOKEN
    passages = generic_passages(side, characters, length, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    return file


def resolved(precision: Precision, device: torch.device) -> str:
    """What `auto` means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


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
