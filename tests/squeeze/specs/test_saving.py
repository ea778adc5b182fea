"""What a job says that it will save: what does save nothing is said to."""

from typing import Any

import pytest

from squeeze.specs.job_spec import JobSpec
from squeeze.specs.saving import savings

GPTQ = {"kind": "quantize", "method": "gptq"}
LOGITS = {"kind": "distill", "method": "logits", "steps": 2}


def told(*steps: dict[str, Any], **fields: Any) -> list[str]:
    asked = {"model": "org/model", "steps": steps, "data": {"source": "file-abcdefgh"}}
    spec = JobSpec.model_validate(asked | fields)
    return savings(spec.steps, spec.formats)


def prune(method: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": method} | fields


@pytest.mark.parametrize(
    ("steps", "formats", "words"),
    [
        ([prune("wanda")], None, ["files, memory and time stay as they were", "`depth` and `width`"]),
        ([prune("wanda", pattern="2:4")], None, ["kernels for 2:4 have to be asked for"]),
        ([prune("wanda")], ["safetensors-zst"], ["files are smaller under zstd, memory and time stay"]),
        ([prune("wanda"), GPTQ], None, ["zeros alone save nothing", "4 bits in the decoder blocks, 4 times fewer"]),
        ([prune("depth", blocks=2)], None, ["fewer parameters: smaller files, less memory and fewer operations"]),
        ([prune("experts", params_target=0.8)], None, ["a token takes as many operations as before"]),
        ([prune("vocabulary")], None, ["decoder blocks take as long as before"]),
        ([prune("svd", params_target=0.8)], ["safetensors"], ["files, memory and time stay", "as `onnx`"]),
        ([prune("svd", params_target=0.8)], ["onnx"], ["factors in the ONNX file"]),
        ([prune("svd", params_target=0.8), LOGITS], ["onnx"], ["factors in the ONNX file"]),
        ([{"kind": "quantize", "method": "fp16"}], None, ["16 bits a weight; half the bytes of a model in 32 bits"]),
        ([{"kind": "distill", "method": "logits", "student": {"layers": 2}}], None, ["of 2 decoder blocks"]),
        ([{"kind": "finetune", "method": "lora"}], None, []),
    ],
)
def test_what_is_saved_is_said_beforehand(
    steps: list[dict[str, Any]], formats: list[str] | None, words: list[str]
) -> None:
    found = told(*steps, **({} if formats is None else {"formats": formats}))
    assert all(any(word in one for one in found) for word in words) and bool(found) == bool(words)
