"""The program that llama.cpp certifies with: run by path in its own environment, it imports nothing of this project.

    LLAMACPP_PYTHON models/certifying/in_llamacpp.py REQUEST.json ANSWER.json

Loads a written file through llama-cpp-python, compares token numbers of a few texts with those given, generates, and
scores the same token windows as the other certifiers.
"""

import ctypes
import importlib.metadata
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LOGIT_BYTES = 64 << 20  # of one float32 slice of logits
F32 = 0  # ggml's number of the type


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    began = time.monotonic()
    answer: dict[str, Any] = {}
    try:
        answer["version"] = importlib.metadata.version("llama-cpp-python")
        answer |= check(request)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the finding
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seconds"] = round(time.monotonic() - began, 3)
    answer["peak_host_bytes"] = peak_host_bytes()
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `sample`, `nll`, a mean in nats for each window, and `texts`, how many were seen to be tokenized alike.

    request: as for the other certifiers; `texts`: pairs of a text and the numbers of its tokens, special ones included.
    """
    import llama_cpp  # type: ignore[import-not-found]

    windows = request["ids"]
    longest = max([len(ids) for ids in windows], default=request["prompt_tokens"])
    model = llama_cpp.Llama(
        model_path=str(next(Path(request["directory"]).glob("*.gguf"))),
        n_ctx=longest + request["new_tokens"],
        n_gpu_layers=0 if request.get("device", "cpu") == "cpu" else -1,
        n_threads=len(os.sched_getaffinity(0)),
        n_threads_batch=len(os.sched_getaffinity(0)),
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    texts = compare_tokens(model, request.get("texts", []))
    nll = [score(model, ids, first) for ids, first in zip(windows, request["first_scored"], strict=True)]
    return {"nll": nll, "sample": generate(model, request), "texts": texts}


def compare_tokens(model: Any, texts: list[tuple[str, list[int]]]) -> int:
    """How many texts were compared; raises where one gives other tokens than it should.

    llama.cpp's SentencePiece puts a space before every text, transformers' only before one that doesn't begin with one:
    such texts are left out there.
    """
    prefixed = model.metadata.get("tokenizer.ggml.add_space_prefix") == "true"
    compared = [(text, expected) for text, expected in texts if not (prefixed and text.startswith((" ", "\u2581")))]
    for text, expected in compared:
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        if found != expected:
            place = next(
                (n for n in range(min(len(found), len(expected))) if found[n] != expected[n]),
                min(len(found), len(expected)),
            )
            raise ValueError(
                f"llama.cpp tokenizes {text[:60]!r} otherwise: from token {place} on {found[place : place + 5]}, "
                f"not {expected[place : place + 5]}"
            )
    return len(compared)


def score(model: Any, ids: list[int], first: int) -> float:
    """Mean negative log-likelihood in nats of ids[first:], through the model in pieces, with its cache."""
    import numpy

    rows = max(16, min(model.n_batch, LOGIT_BYTES // (4 * model.n_vocab())))
    forget(model)
    total = 0.0
    for start in range(0, len(ids) - 1, rows):
        stop = min(start + rows, len(ids) - 1)
        logits = forward(model, ids[start:stop], start)
        for place in range(max(start, first - 1), stop):  # the logits at a position predict the next token
            row = logits[place - start].astype("float64")
            row -= row.max()
            total += math.log(numpy.exp(row).sum()) - row[ids[place + 1]]
    mean = total / (len(ids) - first)
    if not math.isfinite(mean):
        raise ValueError("the logits are not finite")
    return mean


def generate(model: Any, request: dict[str, Any]) -> str:
    """What the model continues the first window's opening with, greedily."""
    prompt = request["ids"][0][: request["prompt_tokens"]] if request["ids"] else model.tokenize(b"The")
    forget(model)
    made: list[int] = []
    logits = forward(model, prompt, 0)[-1]
    for place in range(request["new_tokens"]):
        token = int(logits.argmax())
        if made and token == model.token_eos():
            break
        made.append(token)
        logits = forward(model, [token], len(prompt) + place)[-1]
    return str(model.detokenize(made).decode("utf-8", errors="replace"))


def forget(model: Any) -> None:
    """Empties the cache."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)


def forward(model: Any, ids: list[int], start: int) -> Any:
    """Logits (tokens, vocabulary) float32 of tokens that follow `start` others. The next call overwrites them."""
    import llama_cpp
    import numpy

    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.logits[n] = token, start + n, 1
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
        status = llama_cpp.llama_decode(model.ctx, batch)
        if status:
            raise RuntimeError(f"llama_decode answered {status}")
    finally:
        llama_cpp.llama_batch_free(batch)
    logits = llama_cpp.llama_get_logits(model.ctx)
    return numpy.ctypeslib.as_array(logits, shape=(len(ids), model.n_vocab()))


def peak_host_bytes() -> int:
    """The largest resident size of this program; getrusage would count that of the one that started it too."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
