"""What all requests are made of."""

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """Base of all requests: unknown fields are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
