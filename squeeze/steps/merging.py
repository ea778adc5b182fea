"""The steps that merge: models and adapters that were made from the job's model become one.

As with the other steps, `kind` and `method` are the folder and the file in `models/` (`merge`, `ties` ->
`models/merge/ties.py`).

The job's model is the base. What an entry learned is its task vector, its weights less the base's (arXiv 2212.04089);
the result is the base plus `scale` times what a method makes of all task vectors.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from squeeze.names import HUB_ID, OWN_ID, names_a_model
from squeeze.wire import Wire

MOST_MODELS = 32


class Entry(Wire):
    """A model that was finetuned from the job's model, or an adapter of it in peft's layout."""

    model: Annotated[str, AfterValidator(names_a_model)] = Field(
        min_length=1,
        max_length=4096,
        description="A Hub id, an earlier job (`job-…`) or a directory, as the job's own `model`: of the same "
        "architecture, shapes and vocabulary; or a LoRA or (IA)³ adapter of it.",
    )
    revision: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        pattern=r"^[\w./-]+$",
        description="Of a Hub id: a branch, a tag or a commit; the same as `@revision` behind the id.",
    )
    weight: float = Field(
        1.0,
        ge=-100,
        le=100,
        description="By which its task vector is multiplied. Below 0: what it learned is unlearned.",
    )
    same_base: bool = Field(
        False,
        description="Take an adapter whose settings name another base model, whose weights you know to be those of the "
        "job's model.",
    )

    @model_validator(mode="after")
    def _has_one_revision(self) -> Self:
        if self.revision is None:
            return self
        if self.model.startswith("/") or OWN_ID.match(self.model):
            raise ValueError("only an id of the Hub has a revision: leave it out")
        if "@" in self.model:
            raise ValueError("the revision stands behind the id already: say it once")
        if ".." in self.revision or not HUB_ID.match(self.name):
            raise ValueError(f"{self.revision!r} is no revision")
        return self

    @property
    def name(self) -> str:
        """With the revision."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


def _named(value: Any) -> Any:
    """A bare name is an entry too."""
    return {"model": value} if isinstance(value, str) else value


class Merge(Wire):
    """What every method of merging shares. It looks at no text, and works in float32, a part of a tensor at a time."""

    kind: Literal["merge"] = "merge"
    method: str
    models: tuple[Annotated[Entry, BeforeValidator(_named)], ...] = Field(
        min_length=1,
        max_length=MOST_MODELS,
        description='What is merged: `{"model": …, "weight": …, "revision": …}`, or a bare name; full models and '
        "adapters of the job's model, together if you like.",
    )
    scale: float = Field(
        1.0,
        gt=0,
        le=100,
        description="By which the merged task vector is multiplied before it is added to the base (λ of the papers).",
    )
    by_block: ClassVar[bool] = False
    least: ClassVar[int] = 2  # entries
    signed: ClassVar[bool] = False  # whether a weight may be negative

    @model_validator(mode="after")
    def _has_something_to_merge(self) -> Self:
        if len(self.models) < self.least:
            raise ValueError(f"{self.method} looks at where models differ: name at least {self.least} in `models`")
        for number, entry in enumerate(self.models):
            if entry.weight == 0:
                raise ValueError(f"models.{number} has weight 0 and would do nothing: leave it out")
            if entry.weight < 0 and not self.signed:
                raise ValueError(
                    f"models.{number} has a negative weight, which {self.method} has no use for: take the method linear"
                )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at text."""
        return False

    @property
    def formats(self) -> tuple[Literal["safetensors"], ...]:
        """What a job is written as that ends with this step."""
        return ("safetensors",)

    @property
    def weights(self) -> tuple[float, ...]:
        """By which task vectors are multiplied."""
        return tuple(entry.weight for entry in self.models)


class Summed(Merge):
    """What the methods share that add task vectors up."""

    normalize: bool = Field(
        True,
        description="Divide the weights by their sum, so that the result is an average; false: task vectors are added "
        "up as they are weighted.",
    )
    signed = True
    least = 1

    @model_validator(mode="after")
    def _has_weights_to_divide(self) -> Self:
        if not self.normalize:
            return self
        if len(self.models) == 1 and self.models[0].weight != 1:
            raise ValueError(
                "the weight of a single model over itself is 1 whatever it is: set normalize to false, or say `scale`"
            )
        if sum(entry.weight for entry in self.models) < 1e-6:
            raise ValueError(
                "the weights sum to zero or less, and dividing by that gives no average: set normalize to false"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        total = sum(entry.weight for entry in self.models) if self.normalize else 1.0
        return tuple(entry.weight / total for entry in self.models)


class Linear(Summed):
    """Adds up the weighted task vectors (task arithmetic, arXiv 2212.04089); normalized, with `scale` 1, the weighted
    average of the models (model soups, arXiv 2203.05482).
    """

    method: Literal["linear"]


class TIES(Merge):
    """Trims every task vector to its largest elements, elects a sign for each element by the sum of what is left, and
    averages those of that sign (arXiv 2306.01708). Trimmed tensor by tensor, not over the whole model.
    """

    method: Literal["ties"]
    density: float = Field(
        0.2, gt=0, le=1, description="Share of a tensor's elements that is kept of a task vector, the largest."
    )


class DARE(Summed):
    """Drops elements of the task vectors at random, multiplies the rest so that their mean stays, and adds them up
    (arXiv 2311.03099). Drawn with the job's seed.
    """

    method: Literal["dare"]
    drop: float = Field(0.9, ge=0, lt=1, description="Share of the elements that is dropped (p of the paper).")


class MagMax(Merge):
    """Takes each element from the task vector in which it is largest, whatever its sign (arXiv 2407.06322). Meant for
    models that were finetuned one after the other, each from the last.
    """

    method: Literal["magmax"]


MERGING_METHODS: tuple[type[Merge], ...] = (Linear, TIES, DARE, MagMax)
