"""What a report says of a target of speed."""

from typing import Literal

from pydantic import Field

from squeeze.reports.parts import Part


class SpeedTarget(Part):
    """How a target of speed was met: sizes were timed by parts of both models in turn, before one was made."""

    asked: float = Field(description="Times as many tokens a second as the original's.")
    speed_of: Literal["writing", "prompt"]
    timed: float = Field(description="Of the size that was taken, when sizes were timed.")
    next_larger: float | None = Field(
        description="Of the next larger size, which misses the target; null where that is the original."
    )
    measured: float | None = Field(None, description="Of the result: `speed_after` over `speed_before`.")
