"""What all parts of `report.json` are made of: a text that was looked at, and how good a model is on one."""

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Text(Part):
    """Where token batches came from."""

    origin: str = Field(
        description="`standard library of Python 3.x`, the id of an uploaded file, a Hub dataset's split at a commit "
        "(`hub:org/name@commit:split`), or how the model sampled it itself."
    )
    generic: bool
    sequences: int
    sequence_length: int
    tokens: int
    sha256: str = Field(description="Of the token ids, int64 little-endian.")


class Quality(Part):
    """Measured in the same pass as the compression, on `text`; before is the original, after the result."""

    text: Text
    stride: int
    protocol: str
    scored_tokens: int
    perplexity_before: float | None
    perplexity_after: float | None
    divergence_nats: float | None = Field(description="Mean over scored tokens of KL(original ‖ result).")
    top1_agreement: float | None
