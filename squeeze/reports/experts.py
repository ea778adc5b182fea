"""What a report says of the experts of a mixture."""

from pydantic import Field

from squeeze.reports.parts import Part


class ExpertsLeft(Part):
    """Which experts a step left out; shared ones stay."""

    before: int = Field(description="Experts of each layer that has some.")
    after: int
    chosen_before: int = Field(description="That a token goes to.")
    chosen_after: int
    removed: dict[str, list[int]] = Field(
        description="By the number of the decoder block, counted from 0, as experts are."
    )
    rerouted: float = Field(
        description="Share of what the router sent out, token by token, that went to experts which are gone."
    )
