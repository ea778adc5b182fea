"""Leaves out the tokens that a user's texts don't need, from embedding, output head and tokenizer together.

loading -> calibrating (all texts are counted) -> compressing (and compared) -> evaluating
"""

import copy
import json
from collections.abc import Set
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from models.files.checkpoint import SourceModel, open_or_convert
from models.fingerprint import fingerprint
from models.formats.directory import refuse_broken_companions
from models.job import Inputs, params_named
from models.measuring.evaluation import Measured
from models.measuring.speed import speeds
from models.progress import Notify
from models.prune.slimming.smaller import Done, material_of, sides_of
from models.prune.vocabularies import corpus
from models.prune.vocabularies.corpus import Found, Pass, Survey, Texts
from models.prune.vocabularies.keeping import Kept, keep
from models.prune.vocabularies.pieces import Pieces, bytes_are_characters, named_by
from models.prune.vocabularies.token_ids import named_in
from models.prune.vocabularies.trimmed_quality import Judged, judged
from models.prune.vocabularies.trimming import GENERATION, Words, trimmed_config, words_of, write_beside, write_trimmed
from models.resources import Clock, return_free_memory
from models.streaming.frame import Frame
from models.streaming.teamwork import compute_dtype
from models.texts.data import Windows, bytes_of, evaluation_passages
from models.texts.documents import documents_of
from models.texts.material import Material
from models.work import with_what_follows
from squeeze.costs.slimming_work import counted_slimming
from squeeze.errors import ArchitectureUnsupported
from squeeze.objects import Stage
from squeeze.reports.report import Slimming
from squeeze.reports.vocabulary import Corpus, Trimming, Unseen
from squeeze.shapes.slimmed import Sides
from squeeze.shapes.vocabularies import ROWS, rows_asked
from squeeze.steps.slimming import Vocabulary

IMPORTANCE = "whether a token is in the text, all of it read, or one that is in it is merged from it"
CONVERTER = (
    "llama.cpp's own converter knows how a byte-level tokenizer splits text by the numbers that it gives, and refuses "
    "this one; add a step that quantizes, with the format gguf, where llama.cpp is to run it"
)
FEW_WINDOWS = 4  # are compared where nothing is to be evaluated


@dataclass(frozen=True)
class Read:
    """A user's texts, all of them. themselves: how many decode to themselves."""

    size: Survey
    found: Found
    themselves: int


def prune(found: Set[int], always: Set[int], pieces: Pieces, rows: int, asked: int | None, multiple: int) -> Kept:
    """Which tokens stay; as `models.prune.vocabularies.keeping.keep`."""
    return keep(found, always, pieces, rows, asked, multiple)


def planned(step: Vocabulary, frame: Frame, sides: Sides) -> int | None:
    """Tokens that are asked for, None: as many as needed; raises where that can't be. Needs the config alone."""
    asked = rows_asked(step, frame.source.config, sides)
    ends = (frame.model.get_input_embeddings(), frame.model.get_output_embeddings())
    own = {id(one) for end in ends for one in end.parameters()}
    names = {name for name, one in frame.model.named_parameters() if id(one) in own}
    if any(not ROWS.search(name) for name in names):
        raise ArchitectureUnsupported(
            f"what has a row for each token is not known of a {frame.source.config['model_type']}", param="method"
        )
    return asked


def slimmed(inputs: Inputs, step: Vocabulary, clock: Clock, notify: Notify) -> Done:
    """Makes the smaller model, resuming where an earlier attempt stopped, and measures it."""
    device = torch.device(inputs.device)
    with clock.stage("loading"), params_named(inputs.spec, step):
        notify.stage(Stage.loading)
        base = open_or_convert(inputs.model, inputs.work / "source")
        refuse_broken_companions(base)
        frame = Frame(base, compute_dtype(base.dtype, device), device)
        frame.refuse_misfits()
        asked = planned(step, frame, sides_of(base))
        assert inputs.calibration_text is not None, "a spec that names no text is refused"
        text_bytes = bytes_of(inputs.calibration_text)
        counts = counted_slimming(base.shape(), inputs.spec, step, text_bytes)
        work = {name: count.whole for name, count in counts.items()}
        notify.expect(with_what_follows(work, base, inputs.spec, step, inputs.calibration_text))
        words = words_of(inputs.model)
        pieces = Pieces(words.rules)
        texts = material_of(inputs, step, frame, notify)
        warnings = texts.warnings()
        for warning in warnings:
            notify.event("warning", warning)
    with clock.stage("compressing"), params_named(inputs.spec, step):
        notify.stage(Stage.calibrating)
        read = corpus.texts_in(inputs.calibration_text, inputs.spec.data.column, words.whole)
        size = corpus.survey(read)
        mark = f"{fingerprint(inputs.spec, inputs.identity, inputs.device, base, texts)} {size.sha256}"
        way = Pass(inputs.work / "counted", mark, size, notify, inputs.snapshot_seconds)
        found = corpus.count(read, words.readers, words.end, way)
        rows = int(frame.model.config.vocab_size)
        always = _always(step, base, words, pieces, rows)
        kept = prune(found.numbers | _looked_at(inputs, texts), always, pieces, rows, asked, step.multiple)
        notify.stage(Stage.compressing)
        result, trimmed, left_out = _trimmed(inputs, base, words, kept, notify)
        themselves = _compared(inputs, words, trimmed, kept, read, size, mark, notify)
        return_free_memory()
    with clock.stage("evaluating"):
        notify.stage(Stage.evaluating)
        other = Frame(result, compute_dtype(result.dtype, device), device)
        told = _judged(inputs, (frame, other), (words, trimmed), texts, kept, mark, notify)
        before, after = speeds((frame, other), told.windows.ids[0])
    quality = told.compared.quality if texts.windows is not None else None
    assert texts.calibration is not None, "it was looked at"
    slimming = Slimming(
        method=step.method,
        importance=IMPORTANCE,
        calibration=texts.calibration.text,
        trimming=_told(
            inputs,
            (words, trimmed),
            kept,
            rows,
            Read(size, found, themselves),
            told,
            texts.calibration.text.origin,
            left_out,
        ),
        parameters_before=base.parameters,
        parameters_after=result.parameters,
        bytes_before=base.weight_bytes,
        bytes_after=result.weight_bytes,
        speed_before=before,
        speed_after=after,
        quality=quality if len(inputs.spec.steps) > 1 else None,
    )
    its = copy.copy(texts)
    its.tokenizer, its.windows = trimmed.whole, told.windows if quality is not None else None
    measured = Measured(quality, told.compared.nll_windows) if quality is not None else None
    return Done(base, result.path, slimming, its, measured, warnings + _warnings(inputs, words, left_out), work, mark)


def _always(step: Vocabulary, base: SourceModel, words: Words, pieces: Pieces, rows: int) -> set[int]:
    """Numbers of the tokens that stay whatever the text has."""
    found = pieces.basic() | named_by(words.rules) | named_in(base.config, rows) | set(words.whole.all_special_ids)
    generation = base.path / GENERATION
    if generation.is_file():
        found |= named_in(json.loads(generation.read_text(encoding="utf-8")), rows)
    numbers = words.numbers
    found |= {numbers[token] for token in step.keep if token in numbers}
    for reader in words.readers:
        found |= set(reader.get_added_tokens_decoder())
        for text in (*step.keep, *corpus.opening_of_chats(words.whole)):
            found |= set(reader.encode(text).ids)
    return found


def _looked_at(inputs: Inputs, texts: Material) -> set[int]:
    """Tokens of the sequences that the job itself draws from the text, which begin and end anywhere in it."""
    own = [texts.calibration, texts.windows if inputs.evaluation_text is None else None]
    return {number for each in own if each is not None for number in each.ids.flatten().tolist()}


def _trimmed(
    inputs: Inputs, base: SourceModel, words: Words, kept: Kept, notify: Notify
) -> tuple[SourceModel, Words, list[str]]:
    """(the smaller model, its tokenizer, names of files that are left out). Raises ArchitectureUnsupported where a
    tokenizer numbers its tokens in another way than the file says.
    """
    settings, beside = trimmed_config(base, kept.new, kept.rows), inputs.work / "beside"
    left_out = write_beside(base, words, settings, kept.new, beside)
    trimmed = words_of(beside)
    for old, new in _pairs(words, trimmed):
        was, numbers = old.get_vocab(), kept.new
        if new.get_vocab() != {token: numbers[number] for token, number in was.items() if number in numbers}:
            raise ArchitectureUnsupported(
                "the tokenizer of this model gives its tokens numbers by rules of its own, so that it can't be trimmed",
                param="method",
            )
    made = write_trimmed(base, sides_of(base), kept.rising, settings, beside, inputs.work / "smaller", notify)
    return made, trimmed, left_out


def _compared(
    inputs: Inputs, words: Words, trimmed: Words, kept: Kept, read: Texts, size: Survey, mark: str, notify: Notify
) -> int:
    way = Pass(inputs.work / "compared", mark, size, notify, inputs.snapshot_seconds)
    renumber = kept.renumber(words.end)
    return corpus.compare(read, _pairs(words, trimmed), renumber, way)


def _pairs(words: Words, trimmed: Words) -> list[tuple[Tokenizer, Tokenizer]]:
    """Of tokenizers, each at least once."""
    count = max(len(words.readers), len(trimmed.readers))
    before, after = ([one.readers[min(n, len(one.readers) - 1)] for n in range(count)] for one in (words, trimmed))
    return list(zip(before, after, strict=True))


def _judged(
    inputs: Inputs,
    frames: tuple[Frame, Frame],
    words: tuple[Words, Words],
    texts: Material,
    kept: Kept,
    mark: str,
    notify: Notify,
) -> Judged:
    """On the text that the vocabulary was trimmed to, of which both models get the same tokens: the part of it that is
    held out for evaluation, or where that is another text the sequences that were drawn; and on that other text.
    """
    assert texts.calibration is not None, "it was looked at"
    windows, passages = texts.windows, []
    if windows is None or inputs.evaluation_text is not None:
        count = FEW_WINDOWS if windows is None else inputs.spec.evaluation.samples
        ids = texts.calibration.ids[:count]
        windows = Windows(ids, (1,) * len(ids), ids.shape[1], texts.calibration.text)
    if texts.windows is not None and inputs.evaluation_text is not None:
        evaluation = inputs.spec.evaluation
        passages = evaluation_passages(inputs.evaluation_text, evaluation.column, evaluation.samples, texts.length)
    tokenizers = words[0].whole, words[1].whole
    return judged(inputs, frames, tokenizers, windows, kept, passages, mark, notify)


def _told(
    inputs: Inputs,
    words: tuple[Words, Words],
    kept: Kept,
    rows: int,
    read: Read,
    told: Judged,
    origin: str,
    left_out: list[str],
) -> Trimming:
    found, size = read.found, read.size
    return Trimming(
        rows_before=rows,
        rows_after=kept.rows,
        tokens_before=len(words[0].numbers),
        tokens_after=len(words[1].numbers),
        found=kept.found,
        parts=kept.parts,
        always=kept.always,
        filled=kept.filled,
        corpus=Corpus(
            origin=origin,
            texts=size.texts,
            bytes=size.size_bytes,
            tokens=found.tokens,
            sha256=size.sha256,
            decoded_to_themselves=read.themselves,
            new_share=found.new_share,
        ),
        largest_difference=told.compared.largest_difference,
        compared_positions=told.windows.scored_tokens,
        left_out_probability=told.compared.left_out,
        bits_per_byte_before=told.bits[0],
        bits_per_byte_after=told.bits[1],
        unseen=_unseen(inputs, words, kept, told),
        left_out_files=left_out,
    )


def _unseen(inputs: Inputs, words: tuple[Words, Words], kept: Kept, told: Judged) -> Unseen | None:
    """Of an evaluation text of its own, all of which is made into tokens."""
    if told.passages is None or inputs.evaluation_text is None:
        return None
    (before, after), measured_bytes = told.passages
    evaluation = inputs.spec.evaluation
    stays = kept.renumber(words[0].end) >= 0
    texts = documents_of(inputs.evaluation_text, "evaluation.source", evaluation.column)
    totals, covered, size_bytes = corpus.lengths(texts, [each.readers[0] for each in words], stays)
    return Unseen(
        origin=inputs.evaluation_origin or evaluation.source or inputs.evaluation_text.name,
        bytes=size_bytes,
        tokens_before=totals[0],
        tokens_after=totals[1],
        covered=covered / max(1, totals[0]),
        measured_bytes=measured_bytes,
        bits_per_byte_before=before,
        bits_per_byte_after=after,
    )


def _warnings(inputs: Inputs, words: Words, left_out: list[str]) -> list[str]:
    found = []
    if left_out:
        found.append(
            f"{', '.join(left_out)} can't be written anew and {'is' if len(left_out) == 1 else 'are'} left out; "
            "tokenizer.json says all that they do"
        )
    if bytes_are_characters(words.rules) and isinstance(inputs.spec.steps[-1], Vocabulary):
        found.append(CONVERTER)
    return found
