"""The steps that make a smaller model of the same family, which loads wherever the original does.

As with the other steps, `kind` and `method` are the folder and the file in `models/` (`prune`, `depth` ->
`models/prune/depth.py`). What a result has of each tensor is in `squeeze.slim_shapes`.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from squeeze.wire import Wire


class Slim(Wire):
    """What the methods share that make a plain, smaller model: what matters least on the job's text is left out."""

    kind: Literal["prune"] = "prune"
    method: str
    params_target: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of all parameters, embeddings among them, that the result may have; it has the most that "
        "fit in, and the plan says how many.",
    )
    by_block: ClassVar[bool] = False

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at text."""
        return True

    @property
    def whole(self) -> bool:
        """Whether it makes a whole model, which other steps can go on with."""
        return True

    @property
    def formats(self) -> tuple[Literal["safetensors"], ...]:
        """What a job is written as that ends with this step."""
        return ("safetensors",)


class Depth(Slim):
    """Leaves out the decoder blocks that change least of what comes to them (ShortGPT, arXiv 2403.03853): fewer
    parameters, a smaller key/value cache, and less time for every token, in proportion.
    """

    method: Literal["depth"]
    blocks: int | None = Field(None, ge=1, le=1000, description="Decoder blocks that stay.")
    importance: Literal["influence"] = Field(
        "influence",
        description="What a block is judged by. `influence`: one less the cosine of what it is given and what it hands "
        "on, on average over the tokens of the calibration text, which goes through the model once.",
    )

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        if (self.blocks is None) == (self.params_target is None):
            raise ValueError("say how small: either `blocks`, as many as stay, or `params_target`, a share")
        return self


SLIMMING_METHODS: tuple[type[Slim], ...] = (Depth,)
