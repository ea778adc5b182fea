"""What the steps of a job make smaller or faster, and what they don't: said before anything has run."""

from collections.abc import Sequence

from squeeze.names import Format
from squeeze.steps.distillation import Distill
from squeeze.steps.every import Step
from squeeze.steps.factoring import SVD
from squeeze.steps.quantization import Grouped, Quantize
from squeeze.steps.slimming import Experts, Slim, Vocabulary
from squeeze.steps.sparsifying import Zeroes

SOURCE_BITS = 16


def savings(steps: Sequence[Step], formats: Sequence[Format]) -> list[str]:
    """A sentence for each step that is there to save something."""
    quantizes = any(isinstance(step, Quantize) for step in steps)
    told = []
    for step in steps:
        if isinstance(step, Zeroes):
            told.append(_zeros(step, formats, quantizes=quantizes))
        elif isinstance(step, SVD):
            told.append(_factors(step, formats, quantizes=quantizes))
        elif isinstance(step, Slim):
            told.append(_fewer(step))
        elif isinstance(step, Distill) and step.student.layers is not None:
            told.append(f"{step.method}: a plain model of {step.student.layers} decoder blocks, smaller and quicker")
        elif isinstance(step, Quantize):
            told.append(_codes(step))
    return told


def _zeros(step: Zeroes, formats: Sequence[Format], *, quantizes: bool) -> str:
    if quantizes:
        return f"{step.method}: zeros alone save nothing; what is saved, the step that quantizes saves"
    packed = "safetensors-zst" in formats
    what = "files are smaller under zstd, memory and time stay" if packed else "files, memory and time stay"
    use = (
        f"kernels for {step.pattern} have to be asked for where the model is served"
        if step.pattern is not None
        else "no common engine uses zeros that stand anywhere"
    )
    rather = "" if packed else "; `safetensors-zst` stores it in less room"
    return f"{step.method}: {what} as they were, for {use}{rather}; `depth` and `width` make a model smaller and faster"


def _factors(step: SVD, formats: Sequence[Format], *, quantizes: bool) -> str:
    if quantizes or "onnx" not in formats:
        return (
            f"{step.method}: multiplied out, so that files, memory and time stay as they were; as `onnx` the factors "
            "are stored and run, in fewer bytes and operations"
        )
    plain = "; the safetensors, multiplied out, save nothing" if "safetensors" in formats else ""
    return f"{step.method}: factors in the ONNX file, fewer bytes and fewer operations for every token{plain}"


def _fewer(step: Slim) -> str:
    if isinstance(step, Vocabulary):
        return (
            f"{step.method}: fewer rows of embedding and output head, so smaller files, less memory and a quicker "
            "head; decoder blocks take as long as before, and texts unlike yours take more tokens"
        )
    if isinstance(step, Experts):
        return (
            f"{step.method}: a plain mixture with fewer experts: smaller files and less memory; a token takes as many "
            "operations as before"
        )
    return (
        f"{step.method}: a plain model with fewer parameters: smaller files, less memory and fewer operations for "
        "every token, wherever it is loaded"
    )


def _codes(step: Quantize) -> str:
    scheme = step.scheme()
    bits = step.average_bits if isinstance(step, Grouped) else scheme.bits
    if bits >= SOURCE_BITS:
        return f"{step.method}: 16 bits a weight; half the bytes of a model in 32 bits, nothing of one in 16"
    times = f"{SOURCE_BITS / bits:.3g}"
    return (
        f"{step.method}: codes of about {bits:g} bits in the decoder blocks, {times} times fewer bytes of them than in "
        "16 bits, on disk and in memory; faster where the engine has kernels for it, most while it writes"
    )
