"""How a certifier is asked and what its answer is worth: a fresh process scores the windows that were measured."""

import json
import math
import os
import re
import signal
import site
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.quoting import quoted
from models.texts.data import Windows
from squeeze.names import Format
from squeeze.reports.report import Certificate

# Enough tokens to tell a wrong weight from the noise of another kernel; more would only take longer.
MAX_WINDOWS = 16
MAX_TOKENS = 8192
PROMPT_TOKENS = 16
NEW_TOKENS = 24

# Allowed relative difference of the perplexities. 16-bit sums in another order, and gptqmodel's CPU kernels, which
# round to bfloat16 whatever the model's own type, gave 0.00 to 0.07 % on trained models and 0.8 % on 508 tokens of a
# random one of 64 blocks: noise of some 0.2 nats a token at worst, which averages out.
TOLERANCE = 0.01
NOISE_NATS = 0.2  # over the root of the number of tokens, on top of TOLERANCE

# All of the environment that the consumers see: what finds programs and devices, and no secret.
PASSED_ON = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|LD_PRELOAD|OMP_NUM_THREADS|MKL_NUM_THREADS|PYTHONDONTWRITEBYTECODE|VIRTUAL_ENV"
    r"|CUDA_\w+|NVIDIA_\w+"
)


# What tokenizers go wrong at: spaces, digits, other scripts, code, characters of several bytes.
TEXTS = (
    "Hello, world!",
    "  two  spaces\n\n\tand a tab ",
    "In 1815 he paid 3.14 for 1,000,000 of them; didn't he?",
    "naïve café – Ünïcødé",
    "Привет, мир! 你好，世界。",
    "def f(x: int) -> int:\n    return x ** 2  # 😀",
)


def tokenized(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Texts with the numbers of their tokens, special ones included, that a consumer has to give too."""
    return [(text, list(tokenizer(text)["input_ids"])) for text in TEXTS]


@dataclass(frozen=True)
class Sample:
    """The windows that certifiers score, with what the engine says of them.

    learned: of training examples, which tokens are scored, from `first_scored` on; None: all from there. labels: the
    last id of each is the number of its label, and the result a classifier.
    """

    ids: list[list[int]]
    first_scored: list[int]
    expected: list[float] | None
    learned: list[list[bool]] | None = None
    labels: bool = False

    @classmethod
    def of(cls, windows: Windows | None, expected: list[float] | None) -> "Sample":
        if windows is None or expected is None:
            return cls([], [], None)
        count = max(1, min(MAX_WINDOWS, MAX_TOKENS // windows.ids.shape[1]))
        return cls(windows.ids[:count].tolist(), list(windows.first_scored[:count]), expected[:count])

    @property
    def counts(self) -> list[int]:
        """Scored tokens of each window."""
        if self.learned is not None:
            return [sum(one) for one in self.learned]
        return [len(ids) - first for ids, first in zip(self.ids, self.first_scored, strict=True)]

    @property
    def tolerance(self) -> float:
        """Allowed relative difference where the kernels differ."""
        return TOLERANCE + NOISE_NATS / math.sqrt(max(sum(self.counts), 1))

    @property
    def unmasked(self) -> "Sample":
        """For consumers that score all that follows the first scored token, where that is what was learned."""
        masks = zip(self.learned or (), self.first_scored, strict=self.learned is not None)
        return replace(self, learned=None) if all(all(mask[first:]) for mask, first in masks) else self

    def perplexity(self, nll: list[float]) -> float:
        """Over the scored tokens of all windows, each of which has a mean."""
        mean = sum(count * each for count, each in zip(self.counts, nll, strict=True)) / sum(self.counts)
        return math.exp(min(mean, 700.0))

    def request(self) -> dict[str, Any]:
        return {
            "parent": os.getpid(),
            "ids": self.ids,
            "first_scored": self.first_scored,
            "learned": self.learned,
            "labels": self.labels,
            "prompt_tokens": PROMPT_TOKENS,
        }


@dataclass(frozen=True)
class Ended:
    """How a certifying process ended. answer: what it wrote, empty when it did not come so far. killed: by a signal."""

    answer: Mapping[str, Any]
    last_words: str
    killed: str | None


def run_program(
    command: list[str], request: Mapping[str, Any], scratch: Path, environment: Mapping[str, str], seconds: float | None
) -> Ended:
    """Runs a certifying program in the foreground; its noise goes to a file, of which only the last words are kept."""
    asked, answered, noise = scratch / "request.json", scratch / "answer.json", scratch / "noise.txt"
    asked.write_text(json.dumps(request), encoding="utf-8")
    killed = None
    with noise.open("wb") as log:
        try:
            status = subprocess.run(
                [*command, str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=scratch,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status, killed = 0, f"no answer within {seconds:.0f} s"
    if status < 0:
        killed = signal.Signals(-status).name
    answer = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else {}
    return Ended(answer, _last_words(noise), killed)


def judge(format_name: Format, consumer: str, sample: Sample, ended: Ended, tolerance: float) -> Certificate:
    """What an answer says: loaded and generated, and where there is something to compare with, the same perplexity."""
    answer = ended.answer
    perplexity = expected = None
    outcome, detail = "passed", "generated; no perplexity was measured to compare with"
    if "nll" in answer and sample.ids:
        perplexity = sample.perplexity(answer["nll"])
    if "error" in answer or "nll" not in answer:
        outcome, detail = "failed", quoted(answer.get("error") or ended.killed or ended.last_words)
    elif sample.expected is not None:
        expected = sample.perplexity(sample.expected)
        assert perplexity is not None, "what is expected is of windows"
        apart = abs(perplexity / expected - 1)
        within = apart <= tolerance
        outcome = "passed" if within else "failed"
        detail = (
            f"perplexity {perplexity:.6g} on {len(sample.ids)} {'windows' if sample.learned is None else 'examples'}, "
            f"{apart:.3%} from the {expected:.6g} measured here; {'within' if within else 'more than'} the "
            f"{tolerance:.1%} that other kernels explain"
        )
    return Certificate.model_validate(
        {
            "format": format_name,
            "consumer": consumer,
            "version": answer.get("version"),
            "outcome": outcome,
            "detail": detail,
            "perplexity": perplexity,
            "expected_perplexity": expected,
            "tolerance": tolerance if expected is not None else None,
            "sample": answer.get("sample"),
            "seconds": answer.get("seconds"),
            "peak_host_bytes": answer.get("peak_host_bytes"),
        }
    )


def environment(scratch: str) -> dict[str, str]:
    """Offline, quiet, with all caches in the scratch directory, and without this process's secrets."""
    kept = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    return kept | {
        "HOME": scratch,
        "PYTHONUSERBASE": site.getuserbase(),  # which HOME would move
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": scratch,
        "XDG_CACHE_HOME": scratch,
        "TMPDIR": scratch,
        "TORCHINDUCTOR_CACHE_DIR": scratch,
        "TORCHDYNAMO_DISABLE": "1",  # gptqmodel compiles its layers, which takes a C++ compiler and half a minute
        "TOKENIZERS_PARALLELISM": "false",
        # glibc would keep freed tensors in its arenas: at 24 blocks of width 1024 the peak was 1.9 GB, with these 0.95.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }


def _last_words(noise: Path) -> str:
    """The last line of a process that left no answer: with Python, the exception."""
    lines = [
        line.strip() for line in noise.read_bytes()[-16_384:].decode(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1] if lines else "the process ended without a word"
