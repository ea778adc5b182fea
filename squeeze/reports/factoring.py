"""What the report says of linears that were written as products of two thinner matrices."""

from pydantic import Field

from squeeze.reports.parts import Part


class FactoredLayer(Part):
    """One linear: its rank, or that it stayed as it was."""

    name: str
    rows: int = Field(description="Outputs.")
    columns: int = Field(description="Inputs.")
    rank: int | None = Field(description="Null: no factors would have fewer parameters at that loss; it stays.")
    basis: str = Field(description="Under whose name its second factor is kept: of several, where they share it.")
    parameters: int = Field(description="Of its factors, the second one shared out; or of the weight that stays.")
    energy_kept: float | None = Field(
        description="Share of the energy of its outputs on the calibration text that is the same, before a step that "
        "trains; null where it stays."
    )


class Ranks(Part):
    """How a budget of parameters was shared out, and what that predicts."""

    method: str
    target: float = Field(description="Share of all parameters that the model may have with its factors.")
    measure: str = Field(description="What a singular value was judged by, and on what.")
    parameters_before: int = Field(description="Of the whole model.")
    parameters_after: int = Field(description="With its factors. Multiplied out it has as many as before.")
    factor_bytes: int = Field(description="Of all weights with the factors, in the type of the model.")
    linears: int = Field(description="Of the decoder blocks, that the step does not ignore.")
    factored: int = Field(description="Of these; the others stay.")
    shared: int = Field(description="Of those that are factored, how many share their second factor with another.")
    lost: float | None = Field(
        description="Of what `measure` says, over all linears; predicted for each alone. Null with ranks `uniform`."
    )
    layers: list[FactoredLayer]
