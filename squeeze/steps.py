"""The steps of a job, one class per method: what it takes, with units, ranges and defaults.

A method is found by its name: `kind` and `method` here are the folder and the file in `models/`
(`quantize`, `gptq` -> `models/quantize/gptq.py`). A new method adds its class here and that file, nothing else.
"""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Kind = Literal["quantize"]
Format = Literal["compressed-tensors", "gptq"]
GroupSize = Literal[32, 64, 128, "channel"]


class Wire(BaseModel):
    """Base of all requests: unknown fields are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantize(Wire):
    """What every weight quantization shares."""

    kind: Literal["quantize"] = "quantize"
    method: str
    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per weight code.")
    group_size: GroupSize = Field(
        128, description="Input columns that share one scale; `channel`: one scale for each output row."
    )
    symmetric: bool = Field(True, description="True: the zero point is the middle of the range; False: it is stored.")
    ignore: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        (),
        max_length=64,
        description="Linear layers to leave in 16 bits: shell patterns over their full names, for example "
        "`model.layers.0.*` or `*.down_proj`. Embeddings, norms and the output head are always left alone.",
    )
    needs_calibration: ClassVar[bool]


class RTN(Quantize):
    """Round to nearest: no data, the quickest, the least exact."""

    method: Literal["rtn"]
    needs_calibration = False


class GPTQ(Quantize):
    """Rounds column by column and makes the columns still to come pay for the error (arXiv 2210.17323)."""

    method: Literal["gptq"]
    activation_order: bool = Field(
        True,
        description="Round the columns with the largest activations first. Groups stay where they are, so that the "
        "result loads wherever one without it does.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    needs_calibration = True


METHODS: tuple[type[Quantize], ...] = (RTN, GPTQ)


def _tag(value: Any) -> str | None:
    if isinstance(value, dict):
        return f"{value.get('kind')}.{value.get('method')}"
    # anything may stand here (a number, a string): pydantic then says which methods there are
    return f"{getattr(value, 'kind', None)}.{getattr(value, 'method', None)}"


def tag_of(method: type[Quantize]) -> str:
    """`kind.method` of a step's class, for example `quantize.gptq`."""
    return ".".join(get_args(method.model_fields[name].annotation)[0] for name in ("kind", "method"))


Step = Annotated[
    Annotated[RTN, Tag("quantize.rtn")] | Annotated[GPTQ, Tag("quantize.gptq")],
    Discriminator(_tag),
]
