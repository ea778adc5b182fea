"""How much host memory a distillation will take, from both models' shapes and the spec alone; docs/plan.md has terms.

Either the teacher reads one block at a time before the training, or all of it stands in memory beside the student; what
the training itself takes is counted as of any that trains the whole model, with more copies of the logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from squeeze.costs.distillation_work import CHUNK_TOKENS, WRITTEN_AT_ONCE, Lessons, at_length
from squeeze.costs.memory import BATCH_TOKENS
from squeeze.costs.trainable import Learned
from squeeze.costs.training_memory import FLOAT, HEAP_BYTES, HOLES, Pass, TrainingMemory, needed_to_train, slice_of
from squeeze.names import Format
from squeeze.shapes.model import Block, Shape
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import (
    RELATION_WIDTH,
    Distill,
    Diverging,
    Hidden,
    Logits,
    OnPolicy,
    Sequence,
    stored_bytes_per_token,
)

LOGIT_BYTES = 64 << 20  # of a float32 slice of the teacher's logits
PLACE_BYTES = 8  # of a token of the text: which of the learned ones it is
# Copies of all logits of a micro-batch at one moment, float32, as torch's profiler shows them: of the loss and its
# gradient, and where two models are compared without one.
DIVERGED_COPIES, DIVERGED_COPIES_JSD = 7, 11
COMPARED_COPIES = 6  # of a slice, beside the student's logits
SAID_COPIES = 4  # of a slice, while the likeliest tokens are found
# The same of what is matched, for each of the blocks that are, and once: of hidden states, and of relations, which are
# numbers for each two tokens and each relation head, of queries, keys and values.
STATE_COPIES, RELATED_COPIES = 4, 10
RUNNING_WIDTHS = 4  # of the widest output, while a block runs


@dataclass(frozen=True)
class DistillationMemory:
    """Bytes. process: with its libraries, and the text. stored: of what is kept of the teacher, pages of files that the
    system takes back. streams: hidden states between two of the teacher's blocks. teaching: what else is there before
    the training: a block, or the teacher while it is loaded, and what it writes. beside: of the teacher while the
    student learns. student: what its training takes. comparing: while it is compared with the teacher. certifier: its
    process.
    """

    process: int
    stored: int
    streams: int
    teaching: int
    beside: int
    student: TrainingMemory
    comparing: int

    @property
    def job(self) -> int:
        """Of the job's own process at its peak."""
        return self.process + self.stored + max(self.streams + self.teaching, self._learning)

    @property
    def job_least(self) -> int:
        """As `job`, with activations on disk, and no more pages of files than there is room for."""
        return self.process + max(self.teaching, self._learning)

    @property
    def whole(self) -> int:
        """Of all processes of the job at one moment: the certifier runs beside the job's, which then holds nothing."""
        return max(self.job, self.process + self.student.certifier)

    @property
    def least(self) -> int:
        return max(self.job_least, self.process + self.student.certifier)

    @property
    def _learning(self) -> int:
        training = self.student.job - self.student.process
        return self.beside + max(training, self.student.weights + self.comparing)


def needed_to_distill(
    teacher: Shape,
    student: Shape,
    spec: JobSpec,
    step: Distill,
    learned: Learned,
    formats: Mapping[Format, int],
    told: Lessons | None = None,
    text_bytes: int = 0,
) -> DistillationMemory:
    """The memory of a step that distills. learned: of the student. told: what is learned from, where that is known. The
    rest as `needed_to_train` has it.
    """
    spec, length = at_length(spec, teacher, student)
    each = 2 if step.precision in ("bf16", "fp16") else FLOAT
    stands = isinstance(step, Hidden | OnPolicy) or (isinstance(step, Logits) and not step.keeps_answers)
    keeps = isinstance(step, Logits) and step.keeps_answers
    read = told.read if told is not None and keeps else 0
    held_out = spec.evaluation.samples * length
    compared = Pass(student, step, learned, each, min(step.together * length, held_out), length)
    part = slice_of(teacher, compared.tokens, LOGIT_BYTES)
    return DistillationMemory(
        process=needed_to_train(student, spec, step, learned, {}, text_bytes).process + PLACE_BYTES * read,
        stored=stored_bytes(step, teacher, told),
        streams=min(CHUNK_TOKENS, max(held_out, read)) * teacher.hidden * each,
        teaching=_teaching(teacher, step, each, length, learned, stands=stands),
        beside=teacher.elements * each * stands + held_out * teacher.hidden * each + _across(teacher, student, step),
        student=_student(teacher, student, spec, step, learned, formats, told),
        comparing=teacher.outside * each
        + compared.logits(compared.tokens, 1)
        + COMPARED_COPIES * compared.held(part, 1, 1)
        + compared.gradients(),
    )


def stored_bytes(step: Distill, teacher: Shape, told: Lessons | None) -> int:
    """On disk, of what is kept of the teacher."""
    if not isinstance(step, Logits) or step.top_k == "all" or told is None:
        return 0
    kept = min(step.top_k, max(1, teacher.vocabulary - 1))
    return told.read * stored_bytes_per_token(kept, teacher.vocabulary)


def _teaching(teacher: Shape, step: Distill, each: int, length: int, learned: Learned, *, stands: bool) -> int:
    """Of a teacher that reads a block at a time, and of one that is loaded whole: then the pages of its files too."""
    tokens = max(BATCH_TOKENS, length)
    running = Pass(teacher, step, learned, each, tokens, length)
    widest = max((_widest(block) for block in teacher.blocks), default=0)
    largest = max((_loaded(block, each) for block in teacher.blocks), default=0)
    said = SAID_COPIES * running.held(slice_of(teacher, tokens, LOGIT_BYTES), 1, 1)
    reading = max(largest + RUNNING_WIDTHS * running.held(tokens, widest, each), teacher.outside * each + said)
    if isinstance(step, Sequence):
        cache = WRITTEN_AT_ONCE * min(step.prompt_tokens + step.new_tokens, length) * sum(map(_keys, teacher.blocks))
        written = 2 * cache * each + WRITTEN_AT_ONCE * teacher.vocabulary * FLOAT * SAID_COPIES
        return max(reading, teacher.elements * each + max(written, teacher.elements * teacher.stored_bytes))
    return max(reading, teacher.elements * (each + teacher.stored_bytes)) if stands else reading


def _student(
    teacher: Shape,
    student: Shape,
    spec: JobSpec,
    step: Distill,
    learned: Learned,
    formats: Mapping[Format, int],
    told: Lessons | None,
) -> TrainingMemory:
    """Of the training, on the text or on what the student writes, whichever takes more."""
    each = 2 if step.precision in ("bf16", "fp16") else FLOAT

    def learning(spec: JobSpec, step: Distill, learned_tokens: int) -> TrainingMemory:
        memory, (_, length) = needed_to_train(student, spec, step, learned, formats), at_length(spec, teacher, student)
        tokens = step.together * length
        own = Pass(student, step, learned, each, tokens, length)
        copies, matched, match = _diverging(step), 0, 0
        if isinstance(step, Hidden):
            matched, match = _matching(teacher, student, step, own)
        reading = own.held(tokens, max(map(_widest, teacher.blocks), default=0), each) * RUNNING_WIDTHS
        passing = max(
            own.logits(learned_tokens, copies) + matched,
            own.logits(learned_tokens, 2) + match,
            (own.logits(learned_tokens, 1) + reading) if isinstance(step, Logits) and not step.keeps_answers else 0,
        )
        return replace(memory, passing=max(memory.passing, passing))

    if not isinstance(step, OnPolicy):
        return learning(spec, step, step.together * spec.data.length)
    length = min(step.prompt_tokens + step.new_tokens, spec.data.length)
    together = step.together * (1 if told is None else max(1, round(told.examples * spec.data.length / told.read)))
    written = spec.model_copy(update={"data": spec.data.model_copy(update={"sequence_length": length})})
    alone = {"micro_batch_size": together, "batch_size": together, "packing": False}
    memory = learning(written, step.model_copy(update=alone), together * min(step.new_tokens, length))
    if step.own_share == 1 and step.alpha == 1:
        return replace(memory, certifier=needed_to_train(student, spec, step, learned, formats).certifier)
    text = learning(spec, step, step.together * spec.data.length)
    return max(text, replace(memory, certifier=text.certifier), key=lambda one: one.job)


def _diverging(step: Distill) -> int:
    """Copies of the logits; 0: as of any training on the text."""
    if not isinstance(step, Diverging):
        return 0
    stored = isinstance(step, Logits) and step.keeps_answers
    return DIVERGED_COPIES_JSD if step.objective == "jsd" and not stored else DIVERGED_COPIES


def _matching(teacher: Shape, student: Shape, step: Hidden, own: Pass) -> tuple[int, int]:
    """(what is kept of hidden states or relations until the gradient has passed the logits, the most that is held)."""
    if step.match == "relations":
        heads = max(1, min(teacher.hidden, student.hidden) // RELATION_WIDTH)
        pairs = own.held(own.tokens, heads * own.length, FLOAT)
        return 2 * 3 * pairs, RELATED_COPIES * pairs
    count = min(len(teacher.blocks), len(student.blocks))
    theirs, ours = own.held(own.tokens, teacher.hidden, FLOAT), own.held(own.tokens, student.hidden, FLOAT)
    kept = count * ((2 + (step.match == "cosine")) * theirs + ours * (teacher.hidden != student.hidden))
    return kept, kept + STATE_COPIES * theirs


def _across(teacher: Shape, student: Shape, step: Distill) -> int:
    """Of the matrices between hidden states of two widths: they learn too, with gradients and two moments."""
    if not isinstance(step, Hidden) or step.match == "relations" or teacher.hidden == student.hidden:
        return 0
    return 4 * FLOAT * min(len(teacher.blocks), len(student.blocks)) * teacher.hidden * student.hidden


def _loaded(block: Block, each: int) -> int:
    """Of a block whose tensors come and go, as all blocks do."""
    piece = max((max(group.rows) * group.columns for group in block.groups), default=0) * each
    return int(block.elements * each * (HOLES if piece < HEAP_BYTES else 1))


def _widest(block: Block) -> int:
    return max((max(group.rows) for group in block.groups), default=0)


def _keys(block: Block) -> int:
    """Keys and values of a token."""
    joint = [group.rows for group in block.groups if len(group.rows) >= 3]
    return 2 * min(min(rows) for rows in joint) if joint else 2 * _widest(block)
