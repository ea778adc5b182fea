"""The text of a training: the user's, the generic one, or what a teacher makes of either."""

import hashlib
import json
from pathlib import Path

import torch

from models.distill.sequence import wrote
from models.files.checkpoint import SourceModel
from models.files.disk import write_once
from models.fingerprint import writing_fingerprint
from models.job import Inputs
from models.progress import Notify
from models.resources import Clock
from models.texts.data import CHARACTERS_PER_TOKEN, EVALUATION_SEED, GENERIC_ORIGIN, generic_passages
from models.texts.generic import Split as Side
from models.texts.material import read_tokenizer
from models.train.division import divided
from models.train.examples import Split, read_examples
from models.train.whole import load_whole
from models.work import ahead, work_of_distilling
from squeeze.costs.distillation_work import lessons_written
from squeeze.costs.training_work import tokens_asked
from squeeze.objects import Stage
from squeeze.steps.distillation import Sequence
from squeeze.steps.finetuning import Head
from squeeze.steps.training import Train
from squeeze.texts.domains import Domained
from squeeze.texts.labels import Labelled
from squeeze.texts.records import row_of

EVERYTHING = 1 << 62  # characters


def examples_of(
    inputs: Inputs,
    step: Train,
    teacher: SourceModel | None,
    source: SourceModel,
    length: int,
    dtype: torch.dtype,
    notify: Notify,
    clock: Clock,
) -> Split:
    """What is trained on and measured on; of no text of the user's the generic one, as much of it as is looked at.

    source: the model that learns. dtype: in which the teacher of a distillation writes. clock: what that takes is a
    stage of its own.
    """
    spec, text, held_out = inputs.spec, inputs.calibration_text, inputs.evaluation_text
    origin = inputs.calibration_origin or spec.data.source or GENERIC_ORIGIN
    held_out_origin = inputs.evaluation_origin or spec.evaluation.source or origin
    columns: tuple[str | None, str | None] = spec.data.column, spec.evaluation.column
    generic = text is None
    if text is None:
        text = _generic(inputs.work / "generic.jsonl", "train", tokens_asked(step, length), length, spec.seed)
    if held_out is None and generic:
        wanted = spec.evaluation.samples * length
        held_out = _generic(inputs.work / "generic-held-out.jsonl", "held_out", wanted, length, EVALUATION_SEED)
    if isinstance(step, Sequence):
        assert teacher is not None, "a distillation has a teacher"
        with clock.stage("teaching"):
            text, held_out = _taught(inputs, step, teacher, source, (text, held_out), length, dtype, notify)
        origin, columns = f"{origin}, as the teacher ends it", (None, None)
    label = step.label_column if isinstance(step, Head) else None
    split = read_examples(
        read_tokenizer(source.path),
        text,
        held_out,
        length,
        origins=(origin, held_out_origin),
        columns=columns,
        label=label,
        domain=step.domain_column,
    )
    if generic:
        split.warnings.append(
            f"learned from generic text ({GENERIC_ORIGIN}): name text like your own as data.source for a student that "
            "is to do your work"
        )
    return split


def _taught(
    inputs: Inputs,
    step: Sequence,
    teacher: SourceModel,
    source: SourceModel,
    files: tuple[Path, Path | None],
    length: int,
    dtype: torch.dtype,
    notify: Notify,
) -> tuple[Path, Path]:
    """(what is trained on as the teacher ends it, what is held out as it is)."""
    spec, device = inputs.spec, torch.device(inputs.device)
    columns = spec.data.column, spec.evaluation.column
    records = [
        (is_apart, where, record)
        for is_apart, where, record in divided(*files, columns)
        if not isinstance(record, Labelled | Domained)
    ]
    rows = [json.dumps(row_of(record)) for _, _, record in records]
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    inputs.work.mkdir(parents=True, exist_ok=True)
    held_out = inputs.work / "held-out-as-it-is.jsonl"
    apart = [row for row, (is_apart, _, _) in zip(rows, records, strict=True) if is_apart]
    write_once(held_out, "\n".join(apart) + "\n")
    learned = [record for is_apart, _, record in records if not is_apart]
    told = lessons_written(step, length, len(learned))
    notify.expect(ahead(work_of_distilling(teacher, source, spec, step, told), source, spec, ("loading",)))
    notify.stage(Stage.calibrating)
    written = wrote(
        step,
        lambda: load_whole(teacher.path, dtype, device),
        read_tokenizer(teacher.path),
        learned,
        length,
        spec.seed,
        inputs.work / "teacher" / "wrote",
        writing_fingerprint(step, spec.seed, inputs.identity, inputs.device, teacher, digest, length),
        notify,
    )
    return written, held_out


def _generic(file: Path, side: Side, tokens: int | None, length: int, seed: int) -> Path:
    """A part of the generic text as records."""
    characters = EVERYTHING if tokens is None else tokens * CHARACTERS_PER_TOKEN
    passages = generic_passages(side, characters, length, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_once(file, "".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    return file
