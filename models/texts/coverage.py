"""Whether a text is one that a tokenizer covers, and how much of it is said twice: figures, and what they warn of.

Measured on the token ids that are really used. With a tokenizer of 4096 entries that was trained on source code, up to
2.5 % of English prose's tokens were pieces of characters, 15 % of German's, 92 % of Cyrillic's, 100 % of Chinese's;
prose had 2.6 bytes a token, source code 3.5, random base64 1.1, Cyrillic and Chinese 1.0. Of source code 0.8 % of the
runs of 32 tokens came again, of prose 0.1 %, of twenty copies of one text 85 %.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from models.texts.generic import standard_library

RUN_TOKENS = 32
MOST_REPEATED = 0.2  # share of such runs that were there before
MOST_PIECES = 0.1  # share of tokens
MOST_UNKNOWN = 0.01  # share of tokens
LEAST_DENSITY = 0.5  # bytes a token, as a share of what the tokenizer has on the generic text
REFERENCE_MODULES, REFERENCE_CHARACTERS = 8, 100_000
MOST_TOKENS = 1 << 20  # looked at of a long text


@dataclass(frozen=True)
class Coverage:
    """unknown: share of tokens that stand for whatever the tokenizer doesn't know. pieces: share of tokens that are but
    some of a character's bytes, because it doesn't know the whole. bytes_per_token: of UTF-8.
    """

    unknown: float
    pieces: float
    bytes_per_token: float


def repeated_share(ids: Tensor) -> float:
    """Share of the runs of RUN_TOKENS tokens that stood in the text before. ids: (n, T) int64; each row by itself."""
    ids = _some(ids)
    n = min(RUN_TOKENS, ids.shape[1])
    tokens = ids.numpy().astype(np.uint64)
    runs = tokens.shape[1] - n + 1
    hashes = np.zeros((len(tokens), runs), dtype=np.uint64)
    for k in range(n):  # a polynomial modulo 2**64
        hashes = hashes * np.uint64(6364136223846793005) + tokens[:, k : runs + k] + np.uint64(1)
    return 1.0 - len(np.unique(hashes)) / hashes.size


def coverage(tokenizer: Any, ids: Tensor) -> Coverage:
    """How a tokenizer fares on a text. ids: (n, T) int64, made by it."""
    ids = _some(ids)
    found, counts = np.unique(ids.numpy(), return_counts=True)
    special = set(tokenizer.all_special_ids)
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # GPT-2's, which stands between texts
        unknown = None
    spoken = [(int(token), int(count)) for token, count in zip(found, counts, strict=True) if token not in special]
    total = max(1, sum(count for _, count in spoken) + _count(unknown, found, counts))
    # A token of a part of a character's bytes decodes to the sign of replacement, whatever kind of tokenizer it is.
    pieces = sum(count for token, count in spoken if "\ufffd" in tokenizer.decode([token]))
    text = tokenizer.batch_decode(ids, skip_special_tokens=True)
    size_bytes = sum(len(one.encode(errors="replace")) for one in text)
    return Coverage(_count(unknown, found, counts) / total, pieces / total, size_bytes / total)


def generic_bytes_per_token(tokenizer: Any) -> float:
    """What a tokenizer makes of the generic text, with runs of spaces made one: not all tokenizers know indentation."""
    modules = islice(standard_library("held_out"), REFERENCE_MODULES)
    text = " ".join(" ".join(source.split()) for _, source in modules)[:REFERENCE_CHARACTERS]
    return len(text.encode()) / max(1, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))


def coverage_warnings(tokenizer: Any, ids: Tensor, what: str) -> list[str]:
    """What to say of a user's text. ids: (n, T) int64. what: `calibration text`."""
    found, usual = coverage(tokenizer, ids), generic_bytes_per_token(tokenizer)
    warnings = []
    if found.unknown > MOST_UNKNOWN:
        warnings.append(
            f"{found.unknown:.0%} of the {what} is the unknown token: the tokenizer lacks what it is written in"
        )
    if found.pieces > MOST_PIECES or found.bytes_per_token < LEAST_DENSITY * usual:
        warnings.append(
            f"the tokenizer hardly covers the {what}: {found.bytes_per_token:.2f} bytes a token where generic text "
            f"gives {usual:.2f}, and {found.pieces:.0%} of the tokens are parts of characters. It may be in a language "
            "or script that the model was not made for, or no language at all; figures on it say little about others"
        )
    return warnings


def repetition_warnings(ids: Tensor, what: str) -> list[str]:
    """What to say of a text that says the same again and again. ids: (n, T) int64. what: `calibration text`."""
    share = repeated_share(ids)
    if share <= MOST_REPEATED:
        return []
    return [
        f"{share:.0%} of the {what} repeats itself (runs of {RUN_TOKENS} tokens that were there before; ordinary text "
        "has 1 %): it counts for less than its length, so remove duplicates or give more"
    ]


def _some(ids: Tensor) -> Tensor:
    return ids[: max(1, MOST_TOKENS // ids.shape[1])]


def _count(token: int | None, found: Any, counts: Any) -> int:
    return int(counts[found == token].sum()) if token is not None else 0
