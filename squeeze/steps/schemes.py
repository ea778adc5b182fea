"""How the weights of one linear are stored: what a method makes and a format has to hold; no torch.

A method says what it makes by its step's `scheme()`; a format says in `squeeze.specs.formats` what it holds. Both sides
of the product method × format know nothing else of each other.
"""

from dataclasses import dataclass
from typing import Literal

Element = Literal["int", "float8", "float4", "nf4", "ggml", "float16", "bfloat16", "dense", "factored"]
Activations = Literal["int8", "llm-int8", "float8", "float8-static"]
Group = int | Literal["channel", "tensor"]


@dataclass(frozen=True)
class Scheme:
    """One way to store a linear's weights.

    element: of one code: `int` (0 … 2^bits − 1 with a zero point), `float8` (E4M3), `float4` (E2M1), `nf4`
    (NormalFloat, arXiv 2305.14314 §3), `ggml` (blocks as llama.cpp defines them), a 16-bit type as it is, `dense` (the
    type of the model, of so many bits), or `factored` (a product of two matrices of that type).
    bits: of one code, without scales. group_size: input columns that share a scale; `channel`: an output row,
    `tensor`: all. symmetric: no zero points are stored.
    activations: how a consumer rounds what the linear reads, before it multiplies: `int8` and `float8` with a scale a
    token, found as it runs; `float8-static` with one scale, stored. None: not at all.
    `llm-int8`: as `int8`, but columns with an outlier are multiplied as they are (arXiv 2208.07339).
    nested: the scales are 8-bit codes themselves, 256 to a scale (double quantization, arXiv 2305.14314 §3).
    sparsity: share of the weights that become zero, where element is `dense`.
    ggml: name of the block type, for example `q4_k`, where element is `ggml`.
    rank: columns of the first factor and rows of the second, where element is `factored`; basis: the linear under whose
    name the second is kept, which may be that of several linears with one input.
    """

    element: Element
    bits: int
    group_size: Group
    symmetric: bool = True
    activations: Activations | None = None
    ggml: str | None = None
    nested: bool = False
    sparsity: float = 0.0
    rank: int = 0
    basis: str | None = None

    def columns(self, inputs: int) -> int:
        """Input columns of one scale in a linear of so many inputs."""
        return self.group_size if isinstance(self.group_size, int) else inputs

    def bits_per_weight(self, inputs: int) -> float:
        """Stored bits of a weight in a linear of so many inputs, scales and zero points shared out."""
        if self.ggml is not None:
            return GGML_BITS[self.ggml]
        scale: float = SCALE_BITS[self.element]
        if self.nested:
            scale = 8 + 32 / 256
        elif self.activations == "llm-int8":
            scale = 32
        zero = 0 if self.symmetric else self.bits
        return self.bits + (scale + zero) / self.columns(inputs)


SCALE_BITS: dict[Element, int] = {
    "int": 16,
    "float8": 16,
    "float4": 8,
    "nf4": 32,
    "ggml": 0,
    "float16": 0,
    "bfloat16": 0,
    "dense": 0,
    "factored": 0,
}

# Of one weight, with everything that its block stores (ggml-common.h: block_q2_K and so on).
GGML_BITS: dict[str, float] = {
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q5_0": 5.5,
    "q5_1": 6.0,
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.5625,
    "q8_0": 8.5,
}
