"""The steps that distill: a smaller model, the student, learns to say what the job's model, the teacher, says.

`kind` and `method` are the folder and the file in `models/` (`distill`, `logits` -> `models/distill/logits.py`).
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from squeeze.names import names_a_model
from squeeze.steps.training import Train
from squeeze.wire import Wire

NARROW_IDS = 1 << 16  # ids below fit in 16 bits
RELATION_WIDTH = 16  # of a relation head, as MiniLMv2 has it, of the narrower of both models
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class Student(Wire):
    """What learns: a shape that the teacher is cut to, or a model; neither, where a step before made one smaller."""

    layers: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Decoder blocks of the teacher that the student begins with, taken evenly, the first and the last "
        "among them; embeddings, norms and the output head are the teacher's.",
    )

    model: Annotated[str, AfterValidator(names_a_model)] | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A Hub id, an earlier job (a pruned model, for example) or a directory, as the job's own `model`; "
        "of the same vocabulary as the teacher, but for what fills the table of embeddings up.",
    )

    @model_validator(mode="after")
    def _says_who(self) -> Self:
        if self.layers is not None and self.model is not None:
            raise ValueError("say who learns: either `layers`, so many blocks of the teacher, or `model`")
        return self

    @property
    def named(self) -> bool:
        return self.layers is not None or self.model is not None


class Distill(Train):
    """What every distillation shares. The job's model is the teacher; all weights of the student learn, in float32.

    It learns from the job's `data`, or from the generic text where that names none. Losses are measured on the text
    itself, not on what the teacher says of it.
    """

    kind: Literal["distill"] = "distill"
    student: Student = Field(
        Student(),
        description="Who learns. Left out after a step that prunes, whose smaller model then learns from the original.",
    )
    learning_rate: float = Field(1e-4, gt=0, le=10, description="At its highest.")
    batch_size: int = Field(
        8,
        ge=1,
        le=65536,
        description="Sequences of a step of the optimizer; packed, each is filled up to `data.sequence_length` tokens.",
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Sequences that go through the model together: less memory, the same result but for rounding. Left "
        "out: all of a batch.",
    )

    @property
    def keeps_answers(self) -> bool:
        """Whether the teacher reads all of the text beforehand, and what it says is kept."""
        return False

    @property
    def keeps_factors(self) -> bool:
        return True


class Diverging(Distill):
    """Makes the divergence between the teacher's and the student's next-token distributions smaller.

    With P the teacher's, Q the student's, both with logits over `temperature`, what falls is
    `alpha` · `temperature`² · D(P, Q) + (1 − `alpha`) · cross-entropy with the text (arXiv 1503.02531).
    """

    objective: Divergence = Field(
        "forward_kl",
        description="`forward_kl`: KL(P ‖ Q), the student covers all that the teacher may say. `reverse_kl`: "
        "KL(Q ‖ P), it keeps to what the teacher likes best (arXiv 2306.08543). `jsd`: between them, "
        "`beta` · KL(P ‖ M) + (1 − `beta`) · KL(Q ‖ M) with M = `beta` · P + (1 − `beta`) · Q (arXiv 2306.13649).",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Of `jsd` alone: near 0 like `forward_kl`, near 1 like the other.")
    temperature: float = Field(
        1.0, gt=0, le=100, description="By which both models' logits are divided; the loss is multiplied by its square."
    )
    alpha: float = Field(
        0.9, ge=0, le=1, description="Share of the divergence in the loss; the rest is the cross-entropy with the text."
    )


class Logits(Diverging):
    """Learns the teacher's next-token distributions on the text.

    The teacher reads the text once, before the training, one block in memory at a time, so that it need not fit beside
    the student. What it says is kept on disk: of each token the `top_k` likeliest and the mass of all others together,
    which is one more outcome of both distributions. That divergence is at most the whole one.
    """

    method: Literal["logits"]
    top_k: int | Literal["all"] = Field(
        64,
        description="Tokens whose probabilities are kept, in 6 bytes each (4 where the vocabulary has at most 65,536). "
        "`all`: nothing is kept; the whole teacher stands in memory beside the student and reads every batch.",
    )

    @property
    def keeps_answers(self) -> bool:
        return self.top_k != "all"

    @model_validator(mode="after")
    def _keeps_some(self) -> Self:
        if self.top_k != "all" and not 1 <= self.top_k <= 4096:
            raise ValueError("top_k is a number from 1 to 4096, or `all`")
        return self


class Hidden(Diverging):
    """Learns what the teacher's blocks put out, or how its attention relates tokens, beside its distributions.

    The whole teacher stands in memory beside the student and reads every batch. Block n of the student's N learns from
    the last of the teacher's blocks that make up the same share of its depth; where the teacher is wider, through a
    matrix that is learned too and left behind.
    """

    method: Literal["hidden"]
    match: Literal["mse", "cosine", "relations"] = Field(
        "mse",
        description="`mse`: squared distance of the hidden states over the squared length of the teacher's. `cosine`: "
        "1 − their cosine. `relations`: of the last block alone, KL between softmaxed products of queries with "
        "queries, keys with keys and values with values (arXiv 2012.15828); takes no matrix, whatever the widths.",
    )
    weight: float = Field(1.0, gt=0, le=1000, description="By which that is multiplied before it is added to the loss.")


class Sequence(Distill):
    """Learns the text that the teacher writes after each prompt of the examples (arXiv 1606.07947).

    The teacher, whole in memory before the student is, goes on from the prompt, from a chat up to the assistant's last
    turn, or from the first `prompt_tokens` of a text. What it wrote is kept, so that another attempt doesn't write it
    again. Its vocabulary may be another than the student's. Losses are measured on the examples as they are.
    """

    method: Literal["sequence"]
    new_tokens: int = Field(256, ge=1, le=32768, description="That the teacher writes at most after a prompt.")
    prompt_tokens: int = Field(16, ge=1, le=32768, description="Of a text, from which the teacher goes on.")
    temperature: float = Field(
        1.0, ge=0, le=100, description="Of the teacher's sampling. 0: always what it finds likeliest."
    )
    domainless: ClassVar[str | None] = (
        "domains are weighed by what was lost of the text, and sequence learns what the teacher writes instead"
    )


class OnPolicy(Diverging):
    """Learns what the teacher says of text that the student wrote itself (arXiv 2306.13649, section 3).

    For each batch the student goes on from its examples' prompts, and both models' distributions over what it wrote are
    compared; so it learns to get out of the mistakes that it makes. The whole teacher stands in memory beside it. All
    that is written after a prompt counts as often as its example has learned tokens; what is written is drawn from the
    seed, the step and the example, whatever the number of GPUs.
    """

    method: Literal["on_policy"]
    objective: Divergence = Field("jsd", description=Diverging.model_fields["objective"].description)
    alpha: float = Field(1.0, ge=0, le=1, description=Diverging.model_fields["alpha"].description)
    own_share: float = Field(
        1.0, gt=0, le=1, description="Of the batches, in which the student writes; in the others both read the text."
    )
    new_tokens: int = Field(64, ge=1, le=32768, description="That the student writes at most after a prompt.")
    prompt_tokens: int = Field(16, ge=1, le=32768, description="Of a text, from which the student goes on.")


DISTILLING_METHODS: tuple[type[Distill], ...] = (Logits, Hidden, Sequence, OnPolicy)


def evenly(count: int, wanted: int) -> tuple[int, ...]:
    """Numbers of `wanted` of `count` blocks, as evenly apart as may be, the first and the last among them; of one block
    the first.
    """
    if wanted == 1:
        return (0,)
    return tuple((2 * n * (count - 1) + wanted - 1) // (2 * (wanted - 1)) for n in range(wanted))  # rounded half up


def stored_bytes_per_token(kept: int, vocabulary: int) -> int:
    """Of what is kept of the teacher: an id and a logarithm in float16 of each likely token, and one of the rest."""
    return kept * ((2 if vocabulary <= NARROW_IDS else 4) + 2) + 2
