"""The step that zeroes weights while the model learns: scores say which, and learn too (arXiv 2005.07683)."""

from math import ceil
from typing import Literal, Self

from pydantic import Field, model_validator

from squeeze.errors import SpecInvalid
from squeeze.steps.compressing import Ignored
from squeeze.steps.descent import AT_ITS_HIGHEST, Rate
from squeeze.steps.finetuning import Finetune
from squeeze.steps.sparsifying import Zeroes


class Movement(Zeroes, Finetune):
    """Trains every weight, and beside each weight of the decoder blocks' linears a score: those of the lowest scores
    are zero in the forward pass, more and more of them, and zero in what is written. A weight keeps a high score that
    moves away from zero while it learns, whatever its size (arXiv 2005.07683). 32 bytes for each of these weights.
    """

    kind: Literal["prune"] = "prune"
    method: Literal["movement"]
    ignore: Ignored = ()
    learning_rate: Rate = Field(3e-5, description=AT_ITS_HIGHEST)
    score_learning_rate: float = Field(
        1e-2, gt=0, le=10, description="Of the scores, at its highest; it rises and falls as that of the weights does."
    )
    ramp_start: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps before the first weight is zeroed; rounded up."
    )
    ramp_end: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Share of the steps after which as many are zero as asked for; rounded up. In between their share "
        "rises as a cubic, steeply at first (arXiv 1710.01878). Looks at the held-out loss count from here on.",
    )

    @model_validator(mode="after")
    def _zeroes_step_by_step(self) -> Self:
        if self.ramp_start >= self.ramp_end:
            raise ValueError(
                f"zeroing would end (ramp_end {self.ramp_end:g}) before it begins (ramp_start {self.ramp_start:g}): "
                "set ramp_end to more"
            )
        if self.steps is not None:
            try:
                self.ramp(self.steps)
            except SpecInvalid as error:
                raise ValueError(error.message) from None
        return self

    @model_validator(mode="after")
    def _has_a_state_for_every_score(self) -> Self:
        if self.optimizer in ("galore", "badam"):
            raise ValueError(
                f"{self.optimizer} leaves gradients out that scores are learned from: set optimizer to adamw or "
                "adamw8bit"
            )
        return self

    def ramp(self, steps: int) -> tuple[int, int]:
        """Of so many steps (those until the first weight is zeroed, those until all are). Raises SpecInvalid where none
        are left between the two, or after them.
        """
        first, last = ceil(self.ramp_start * steps - 1e-9), ceil(self.ramp_end * steps - 1e-9)
        if not first < last < steps:
            raise SpecInvalid(
                f"of {steps} steps, {first} are before the first weight is zeroed and {last} until all are: at least "
                "one has to be between the two, and one after them; train for more steps, or change ramp_start and "
                "ramp_end",
                param="ramp_end",
            )
        return first, last

    def zeroed_after(self, done: int, steps: int) -> float:
        """The share of zeros after so many of all steps: v_f + (v_i − v_f)(1 − (t − t_i) / (t_f − t_i))³, v_i = 0
        (arXiv 2005.07683, section 4).
        """
        first, last = self.ramp(steps)
        left = min(1.0, max(0.0, 1 - (done - first) / (last - first)))
        return self.sparsity * (1 - left**3)
