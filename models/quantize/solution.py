"""What a method answers for one linear: its codes, and what it had to do to get them."""

from dataclasses import dataclass

from models.codes import Codes


@dataclass(frozen=True)
class Solution:
    """damping: share of the mean diagonal that was added in the end. escalations: times that it had to be raised."""

    codes: Codes
    damping: float | None = None
    escalations: int = 0
