"""Where in a job a vocabulary may be trimmed."""

from collections.abc import Sequence

from squeeze.steps.distillation import Distill
from squeeze.steps.slimming import Slim, Vocabulary
from squeeze.steps.sparsifying import Zeroes


def refuse_misplaced_trimming(steps: Sequence[object], *, told: bool) -> None:
    """Raises ValueError where a vocabulary is trimmed twice, to no text of the user's, or so that a teacher has other
    tokens than who learns from it. told: whether the job names a text.
    """
    trims = [number for number, step in enumerate(steps) if isinstance(step, Vocabulary)]
    if not trims:
        return
    if len(trims) > 1:
        raise ValueError(f"steps {trims} trim the vocabulary to the same text: keep one of them")
    if not told:
        raise ValueError(
            "vocabulary leaves what your texts need: name a file (file-…) or a dataset (hub:…) as data.source"
        )
    taken = any(isinstance(one, Slim | Zeroes | Distill) for one in steps[: trims[0]])
    for number, step in enumerate(steps):
        if isinstance(step, Distill) and trims[0] < number and (taken or step.student.model is not None):
            raise ValueError(
                f"steps.{number}: teacher and student would have other tokens, so that there is nothing to compare: "
                "let vocabulary be the first step, and another model be no student"
            )
