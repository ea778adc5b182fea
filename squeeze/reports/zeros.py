"""What the report says of zeros, block by block."""

from pydantic import Field

from squeeze.reports.parts import Part


class BlockZeros(Part):
    """Of a step that gives each decoder block its own share of zeros."""

    index: int
    outliers: float = Field(
        description="Share of the block's weights whose magnitude times the root mean square of their inputs is above "
        "`outlier_multiple` times the mean."
    )
    sparsity: float = Field(description="Share of the block's weights that were to become zero.")
