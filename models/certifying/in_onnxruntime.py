"""The program that ONNX Runtime certifies with: run by path, it imports nothing of this project, and no torch.

    PYTHON models/certifying/in_onnxruntime.py REQUEST.json ANSWER.json

Loads a written directory, generates with its cache, and scores the same token windows as the other certifiers. The end
of the first window goes through the cache token by token, so that a cache that is wired wrong shows in its perplexity.
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
LOGIT_BYTES = 256 << 20  # of one float32 slice of logits
STEPS = 8  # tokens of the first window that are scored one by one


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    began = time.monotonic()
    answer: dict[str, Any] = {}
    try:
        answer["version"] = importlib.metadata.version("onnxruntime")
        answer |= check(request)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the finding
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seconds"] = round(time.monotonic() - began, 3)
    answer["peak_host_bytes"] = peak_host_bytes()
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


class Model:
    """A session and the keys and values of what it has seen."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one.shape for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.vocabulary = int(self.session.get_outputs()[0].shape[-1])
        self.forget()

    def forget(self) -> None:
        """Empties the cache."""
        import numpy

        self.seen = 0
        self.past = {
            name: numpy.zeros((1, shape[1], 0, shape[3]), numpy.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def forward(self, ids: list[int]) -> Any:
        """Logits (tokens, vocabulary) float32 of tokens that follow what was seen."""
        import numpy

        stop = self.seen + len(ids)
        given: dict[str, Any] = {
            "input_ids": numpy.array([ids], numpy.int64),
            "attention_mask": numpy.ones((1, stop), numpy.int64),
            "position_ids": numpy.arange(self.seen, stop, dtype=numpy.int64)[None],
        }
        given = {name: value for name, value in given.items() if name in self.inputs} | self.past
        made = dict(zip(self.outputs, self.session.run(self.outputs, given), strict=True))
        self.past = {name: made[name.replace("past_key_values.", "present.")] for name in self.past}
        self.seen = stop
        return made["logits"][0]


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Returns `sample` and `nll`, a mean in nats for each window."""
    directory = Path(request["directory"])
    model = Model(directory / "model.onnx")
    nll = [
        score(model, ids, first, STEPS if n == 0 else 0)
        for n, (ids, first) in enumerate(zip(request["ids"], request["first_scored"], strict=True))
    ]
    return {"nll": nll, "sample": generate(model, directory, request)}


def score(model: Model, ids: list[int], first: int, steps: int) -> float:
    """Mean negative log-likelihood in nats of ids[first:]; the last `steps` tokens go in one by one."""
    import numpy

    rows, whole = max(16, LOGIT_BYTES // (4 * model.vocabulary)), len(ids) - 1
    cuts = [*range(0, max(whole - steps, 0), rows), *range(max(whole - steps, 0), whole)]
    model.forget()
    total = 0.0
    for start, stop in zip(cuts, [*cuts[1:], whole], strict=True):
        logits = model.forward(ids[start:stop])
        for place in range(max(start, first - 1), stop):  # the logits at a position predict the next token
            row = logits[place - start].astype("float64")
            row -= row.max()
            total += math.log(numpy.exp(row).sum()) - row[ids[place + 1]]
    mean = total / (len(ids) - first)
    if not math.isfinite(mean):
        raise ValueError("the logits are not finite")
    return mean


def generate(model: Model, directory: Path, request: dict[str, Any]) -> str:
    """What the model continues the first window's opening with, greedily."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
    if request["ids"]:
        prompt = request["ids"][0][: request["prompt_tokens"]]
    else:
        prompt = (tokenizer.encode("The").ids if tokenizer else None) or [0]
    model.forget()
    made: list[int] = []
    token = int(model.forward(prompt)[-1].argmax())
    while len(made) < request["new_tokens"]:
        made.append(token)
        token = int(model.forward([token])[-1].argmax())
    return str(tokenizer.decode(made)) if tokenizer else " ".join(map(str, made))


def peak_host_bytes() -> int:
    """The largest resident size of this program; getrusage would count that of the one that started it too."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
