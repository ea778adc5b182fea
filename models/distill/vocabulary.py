"""Whether teacher and student mean the same by the same number."""

from pathlib import Path

from models.certifying.running import TEXTS
from models.texts.material import read_tokenizer
from squeeze.errors import VocabulariesDiffer
from squeeze.steps.distillation import Distill


def shared_vocabulary(teacher: Path, student: Path) -> int | None:
    """How many numbers of tokens mean the same to both, from 0 on, or None where they are of different tokenizers.

    One may know special tokens that the other lacks, and either's table of embeddings may be filled up behind.
    """
    own, other = read_tokenizer(teacher), read_tokenizer(student)
    words, others = own.get_vocab(), other.get_vocab()
    both = words.keys() & others.keys()
    added = own.get_added_vocab().keys() | other.get_added_vocab().keys()
    if (words.keys() ^ others.keys()) - added or any(words[word] != others[word] for word in both):
        return None
    if any(own(text)["input_ids"] != other(text)["input_ids"] for text in TEXTS):
        return None
    return 1 + max(int(words[word]) for word in both)


def refuse_foreign(step: Distill, teacher: Path, student: Path) -> int:
    """As `shared_vocabulary`; raises VocabulariesDiffer where the step compares what both say of a token."""
    found = shared_vocabulary(teacher, student)
    if found is None:
        raise VocabulariesDiffer(
            f"teacher and student cut text into other tokens, so that {step.method} has nothing to compare: name a "
            "student of the teacher's family, or take the method `sequence`, which learns from the teacher's text",
            param="student.model",
        )
    return found
