"""What a distillation does, counted as `squeeze.costs.work` counts: the student's training, and the teacher's part.

What the teacher says of a text costs a forward pass of every token, whether it stands in memory whole or reads block by
block; what either writes costs that too, and all weights read once more for each token that is written.
"""

from dataclasses import dataclass
from math import ceil

from squeeze.costs.trainable import Learned
from squeeze.costs.training_work import BYTES_PER_TOKEN, counted_training, of_outside, tokens_asked, tokens_of_text
from squeeze.costs.work import BYTE, COMPARED_VISITS, TOKEN, VISIT, Count, of_head, of_reading, of_token
from squeeze.shapes.model import Shape
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import (
    RELATION_WIDTH,
    Distill,
    Hidden,
    Logits,
    OnPolicy,
    Sequence,
    stored_bytes_per_token,
)
from squeeze.steps.training import USUAL_EPOCHS

CHUNK_TOKENS = 1 << 20  # that go through all blocks of the teacher together: as often it is read from disk
WRITTEN_AT_ONCE = 16  # prompts; as many on every machine, because they decide how sums round
GENERIC_BYTES = 10_600_000  # of the generic text, the part that is learned from
GENERIC_BYTES_PER_TOKEN = 6.0  # of it, as many as are taken for a token that is asked for
PASSAGE_TOKENS = 1.1  # of it, in sequences
LIKELY_VISITS = 20  # of a token of the vocabulary while the likeliest are found, and the rest added up
DIVERGED_VISITS = 16  # of one while a divergence and its gradient are computed
MATCHED_VISITS = 12  # of a number of a hidden state, or a share of attention, that is compared, forwards and backwards


@dataclass(frozen=True)
class Lessons:
    """What is learned from. read: tokens of the text, each once. seen: that go through the student to be learned from,
    as often as they do. examples: into which the text is divided, each with a prompt.
    """

    read: int
    seen: int
    examples: int


def lessons(spec: JobSpec, step: Distill, length: int, text_bytes: int | None, records: int | None) -> Lessons | None:
    """As a plan can know them; None where nothing tells. length: of a sequence, in tokens. text_bytes, records: of the
    user's text, as far as they are known.
    """
    asked = tokens_asked(step, length)
    if spec.data.source is None:
        wanted = GENERIC_BYTES if asked is None else GENERIC_BYTES_PER_TOKEN * asked
        read = min(GENERIC_BYTES, wanted) / BYTES_PER_TOKEN
        prompts = read / (PASSAGE_TOKENS * length)
    elif text_bytes is not None:
        read = tokens_of_text(spec, text_bytes)
        prompts = read / length if records is None else records * read / (text_bytes / BYTES_PER_TOKEN)
    elif asked is not None and not _reads_everything(step):
        read = asked
        prompts = read / length
    else:
        return None
    if isinstance(step, Sequence):
        return lessons_written(step, length, prompts)
    examples = max(prompts, read / length + prompts / 2)  # longer texts are cut up, and their ends are examples too
    seen = asked or (step.epochs or USUAL_EPOCHS) * read
    return Lessons(max(1, int(read)), max(1, int(seen)), max(1, ceil(examples)))


def lessons_written(step: Sequence, length: int, prompts: float) -> Lessons:
    """What the teacher writes after so many prompts, as long as it may be."""
    read = prompts * min(step.prompt_tokens + step.new_tokens, length)
    seen = tokens_asked(step, length) or (step.epochs or USUAL_EPOCHS) * read
    return Lessons(max(1, int(read)), max(1, int(seen)), max(1, ceil(prompts)))


def counted_distillation(
    teacher: Shape,
    student: Shape,
    spec: JobSpec,
    step: Distill,
    learned: Learned,
    told: Lessons,
    *,
    last: bool,
    steps: int | None = None,
) -> dict[str, Count]:
    """The work of a step that distills, by stage. learned: of the student. The rest as `counted_training` has it.

    What the student writes is taken to be as long as it may be, and each prompt as `prompt_tokens` says.
    """
    spec, length = at_length(spec, teacher, student)
    steps = steps or ceil(told.seen / (step.sequences * length))
    stages = counted_training(student, spec, step, learned, told.seen, last=last, steps=steps)
    if isinstance(step, OnPolicy):
        through = _judged(step, told) + (told.seen if step.alpha < 1 else 0)
        other = counted_training(student, spec, step, learned, through, last=last, steps=steps)
        stages |= {"training": other["training"]}
    scored = spec.evaluation.samples * length
    heads = of_head(student) + of_head(teacher) + COMPARED_VISITS * VISIT * teacher.vocabulary
    comparing = Count(scored * heads + of_outside(teacher), scored * _forward(student, length))
    once = told.seen / max(1.0, step.epochs or 1.0)
    cutting = 2 * student.stored_bytes * BYTE * (step.student.layers is not None)
    elements = sum(block.elements for block in student.blocks)
    before = Count(TOKEN * max(0.0, told.read - once) + cutting * student.outside, cutting * elements)
    return {
        "loading": _sum(stages["loading"], before, comparing),
        "teaching": _teaching(teacher, spec, step, told, length),
        "training": _sum(stages["training"], _judging(teacher, student, step, told, length, steps)),
        "exporting": _sum(stages["exporting"], comparing),
    } | {name: count for name, count in stages.items() if name == "certifying"}


def at_length(spec: JobSpec, teacher: Shape, student: Shape) -> tuple[JobSpec, int]:
    """The job with sequences that both models can read, and their length in tokens."""
    length = min([spec.data.length, *(one.positions for one in (teacher, student) if one.positions)])
    return spec.model_copy(update={"data": spec.data.model_copy(update={"sequence_length": length})}), length


def _reads_everything(step: Distill) -> bool:
    """Whether the teacher looks at all of the text, however much of it is then learned from."""
    return isinstance(step, Sequence) or step.keeps_answers


def _teaching(teacher: Shape, spec: JobSpec, step: Distill, told: Lessons, length: int) -> Count:
    """What the teacher does before the training: it reads what is held out, and what it says is kept; or it is loaded,
    and writes.
    """
    forward, reading, outside = _forward(teacher, length), _reading(teacher), of_outside(teacher)
    held_out = Count(2 * outside, spec.evaluation.samples * length * forward + reading)
    if isinstance(step, Logits) and step.top_k != "all":
        chunks = ceil(told.read / CHUNK_TOKENS)
        kept = BYTE * stored_bytes_per_token(step.top_k, teacher.vocabulary)
        said = of_head(teacher) + LIKELY_VISITS * VISIT * teacher.vocabulary + kept
        return _sum(held_out, Count(2 * chunks * outside + told.read * said, chunks * reading + told.read * forward))
    writing = Count()
    if isinstance(step, Sequence):
        writing = _writing(teacher, step, told.examples, ceil(told.examples / WRITTEN_AT_ONCE))
    return _sum(held_out, Count(outside, reading), writing)


def _judging(teacher: Shape, student: Shape, step: Distill, told: Lessons, length: int, steps: int) -> Count:
    """What the training has beside the student's passes: what the teacher says of each batch, how far that is from what
    the student says, and what this writes.
    """
    diverged = DIVERGED_VISITS * VISIT * teacher.vocabulary
    if isinstance(step, Sequence):
        return Count()
    if isinstance(step, Logits) and step.top_k != "all":
        return Count(told.seen * diverged)
    judged = _judged(step, told) if isinstance(step, OnPolicy) else told.seen
    found = Count(judged * (of_head(teacher) + diverged), judged * _forward(teacher, length))
    if isinstance(step, Hidden):
        found = _sum(found, Count(told.seen * _matching(teacher, student, step, length)))
    if isinstance(step, OnPolicy):
        turns = step.own_share * steps * ceil(step.sequences / step.together)
        found = _sum(found, _writing(student, step, step.own_share * _examples_seen(told), turns))
    return found


def _writing(shape: Shape, step: Sequence | OnPolicy, prompts: float, turns: float) -> Count:
    """turns: in which some prompts are gone on from together, all weights being read for each token."""
    forward = _forward(shape, step.prompt_tokens + step.new_tokens)
    active = sum(block.active for block in shape.blocks)
    tokens = prompts * (step.prompt_tokens + step.new_tokens)
    return Count(
        prompts * step.new_tokens * of_head(shape), tokens * forward + turns * step.new_tokens * VISIT * active
    )


def _matching(teacher: Shape, student: Shape, step: Hidden, length: int) -> float:
    """Of a token: of as many blocks as the shallower model has, or of the last one's queries, keys and values."""
    if step.match == "relations":
        narrower = min(teacher.hidden, student.hidden)
        scores = 2 * length * (teacher.hidden + 3 * student.hidden)  # forwards, and the student's backwards
        return 3 * (scores + MATCHED_VISITS * VISIT * length * narrower / RELATION_WIDTH)
    pairs = min(len(teacher.blocks), len(student.blocks))
    across = 6 * student.hidden * teacher.hidden * (student.hidden != teacher.hidden)
    return pairs * (across + MATCHED_VISITS * VISIT * teacher.hidden)


def _judged(step: OnPolicy, told: Lessons) -> int:
    """Tokens that both models read: what the student wrote, prompts and all, and of the text the other batches."""
    own = _examples_seen(told) * (step.prompt_tokens + step.new_tokens)
    return int(step.own_share * own + (1 - step.own_share) * told.seen)


def _examples_seen(told: Lessons) -> float:
    """As often as they are."""
    return told.examples * told.seen / told.read


def _forward(shape: Shape, length: int) -> float:
    return sum(of_token(block, shape, length) for block in shape.blocks)


def _reading(shape: Shape) -> float:
    return sum(of_reading(block, shape) for block in shape.blocks)


def _sum(*counts: Count) -> Count:
    return Count(sum(one.fixed for one in counts), sum(one.blocks for one in counts))
