"""A tokenizer as llama.cpp reads it: tokens, kinds, merges or scores, how text is split, special tokens, template.

llama.cpp knows ways to split text by name only. The name is found from the very rules of the tokenizer; a tokenizer
whose rules have no name there is refused, for a wrong one loads and gives other tokens without a word.
"""

import base64
import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from squeeze.errors import FormatUnfit, ModelMalformed

BYTES_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
SUFFIX = f"{SUFFIXES}?"
WORDS = START + r"\p{L}+"
CASED = f"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*"
CASED_WITH_SUFFIX = f"{START}{UPPER}*{LOWER}+{SUFFIX}|{START}{UPPER}+{LOWER}*{SUFFIX}"
CASED_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

# llama.cpp's names (llama-vocab.cpp) by the rules: how text is split in turn, and whether a whole word that is a token
# is one without any merge.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes",), False): "gpt-2",
    (("digit", "bytes"), False): "smollm",
    ((f"{SUFFIXES}|{WORDS}|\\p{{N}}{{1,3}}|{MARKS}|{SPACES}",), True): "llama-bpe",
    ((f"{SUFFIXES}|{WORDS}|\\p{{N}}{{1,3}}|{MARKS}|{SPACES}",), False): "dbrx",
    ((f"{SUFFIXES}|{WORDS}|\\p{{N}}|{MARKS}|{SPACES}",), False): "qwen2",
    ((f"{CASED_WITH_SUFFIX}|\\p{{N}}{{1,3}}|{CASED_MARKS}|{SPACES}",), False): "gpt-4o",
    ((f"{CASED}|\\p{{N}}|{CASED_MARKS}|{SPACES}",), True): "tekken",
    (("marks", "bytes", "digits", "[0-9][0-9][0-9]"), False): "falcon",
    ((r" ?[^(\s|[.,!?…。，、।۔،])]+",), False): "bloom",
}
SPLITTING_BYTES = "ByteLevel"
SPACE = "▁"
NEVER_MERGED = -1e6  # score of a token that no merge makes
SPECIAL = ("bos", "eos", "unk", "pad")


def write_vocabulary(writer: GGUFWriter, directory: Path, rows: int) -> list[str]:
    """Adds the tokenizer of a model directory, and says in what llama.cpp will differ. rows: of the token embedding.

    Raises FormatUnfit where llama.cpp has no such tokenizer.
    """
    tokenizer = _tokenizer(directory)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = rules["model"]["type"]
    if kind == "BPE" and _splits_bytes(rules):
        _write_bytes(writer, rules, rows)
    elif kind == "BPE":
        _write_pieces(writer, rules, rows, dict(_merge_scores(rules)))
    elif kind == "Unigram":
        _write_unigram(writer, rules, rows)
    else:
        raise FormatUnfit(
            f"llama.cpp has no tokenizer like this model's ({kind}); ask for another format", param="formats"
        )
    _write_special(writer, tokenizer)
    if any(part["type"] == "Metaspace" for part in _parts(rules["pre_tokenizer"], "pretokenizers")):
        return [
            "llama.cpp puts a space before every text, also before one that begins with a space already: such texts "
            "get one token more there than in transformers"
        ]
    return []


def refuse_vocabulary(directory: Path) -> None:
    """Raises FormatUnfit where llama.cpp has no such tokenizer, before any work that it would waste."""
    write_vocabulary(GGUFWriter(None, "llama"), directory, rows=0)


def _tokenizer(directory: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelMalformed("the model has no tokenizer that transformers can load, which gguf needs") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise FormatUnfit("gguf needs a tokenizer with a tokenizer.json; ask for another format", param="formats")
    return tokenizer


def _splits_bytes(rules: dict[str, Any]) -> bool:
    return any(part["type"] == SPLITTING_BYTES for part in _parts(rules["pre_tokenizer"], "pretokenizers"))


def _parts(rule: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a rule, in turn."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [part for each in rule[inner] for part in _parts(each, inner)]
    return [rule]


def _split_name(rules: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    steps: list[str] = []
    for part in _parts(rules["pre_tokenizer"], "pretokenizers"):
        if part["type"] == SPLITTING_BYTES:
            if part["add_prefix_space"]:
                raise FormatUnfit(
                    "llama.cpp has no byte-level tokenizer that puts a space before every text; ask for another format",
                    param="formats",
                )
            steps += ["bytes"] if part["use_regex"] else []
        elif part["type"] == "Digits":
            steps.append("digit" if part["individual_digits"] else "digits")
        elif part["type"] == "Punctuation":
            steps.append("marks")
        elif part["type"] == "Split":
            pattern = part["pattern"].get("Regex") or part["pattern"].get("String", "")
            whole = (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True))
            steps.append("bytes" if pattern == BYTES_REGEX else pattern if whole else f"{part['behavior']} {pattern}")
        else:
            steps.append(part["type"])
    normalizers = [part["type"] for part in _parts(rules["normalizer"], "normalizers")]
    name = NAMES.get((tuple(steps), bool(rules["model"].get("ignore_merges"))))
    if name is None or any(each != "NFC" for each in normalizers):
        raise FormatUnfit(
            "the tokenizer splits text in a way that llama.cpp has no name for "
            f"({', '.join([*normalizers, *steps])[:300]}); ask for another format",
            param="formats",
        )
    return name


def _write_bytes(writer: GGUFWriter, rules: dict[str, Any], rows: int) -> None:
    """BPE over bytes, as GPT-2's."""
    tokens, kinds = _tokens(rules, rules["model"]["vocab"], rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(rules))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in _merges(rules)])


def _merges(rules: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in rules["model"]["merges"]]


def _merge_scores(rules: dict[str, Any]) -> list[tuple[str, float]]:
    """SentencePiece merges what gives the token of the highest score: the earlier a merge stands, the higher."""
    return [("".join(pair), -float(rank)) for rank, pair in reversed(list(enumerate(_merges(rules))))]


def _write_pieces(writer: GGUFWriter, rules: dict[str, Any], rows: int, scores: dict[str, float]) -> None:
    """BPE over characters with bytes for the rest, as Llama 2's and Gemma's."""
    if not rules["model"].get("byte_fallback"):
        raise FormatUnfit("llama.cpp has no BPE without bytes to fall back on; ask for another format", param="formats")
    tokens, kinds = _tokens(rules, rules["model"]["vocab"], rows)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, NEVER_MERGED) for token in tokens])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(_prefixes_space(rules))


def _write_unigram(writer: GGUFWriter, rules: dict[str, Any], rows: int) -> None:
    """The likeliest division into pieces, as T5's."""
    pieces: list[tuple[str, float]] = [(piece, score) for piece, score in rules["model"]["vocab"]]
    tokens, kinds = _tokens(rules, {piece: n for n, (piece, _) in enumerate(pieces)}, rows)
    scores = [score for _, score in pieces][: len(tokens)]
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores + [0.0] * (len(tokens) - len(scores)))
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(_prefixes_space(rules))
    normalizers = _parts(rules["normalizer"], "normalizers")
    writer.add_remove_extra_whitespaces(
        any(part["type"] == "Replace" and part["content"] in (" ", SPACE) for part in normalizers)
    )
    for part in normalizers:
        if part["type"] == "Precompiled" and part["precompiled_charsmap"]:
            writer.add_precompiled_charsmap(base64.b64decode(part["precompiled_charsmap"]))


def _prefixes_space(rules: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    if any(part["type"] == "Prepend" for part in _parts(rules["normalizer"], "normalizers")):
        return True
    pre = _parts(rules["pre_tokenizer"], "pretokenizers")
    return any(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in pre)


def _tokens(rules: dict[str, Any], vocabulary: dict[str, int], rows: int) -> tuple[list[str], list[int]]:
    """Every token's text and kind by its number; numbers that no token has are filled."""
    known = {number: token for token, number in vocabulary.items()}
    added = {each["id"]: each for each in rules["added_tokens"]}
    count = rows or max([*known, *added]) + 1
    unknown = rules["model"].get("unk_token")
    unknown_number = rules["model"].get("unk_id") if unknown is None else vocabulary.get(unknown)
    tokens, kinds = [], []
    for number in range(count):
        if number in added:
            token = added[number]["content"]
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            if kind == TokenType.USER_DEFINED and rules["model"]["type"] != "BPE":
                token = token.replace(" ", SPACE)
        elif number in known:
            token = known[number]
            kind = TokenType.BYTE if _is_byte(token, rules) else TokenType.NORMAL
        else:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        tokens.append(token)
        kinds.append(int(TokenType.UNKNOWN if number == unknown_number else kind))
    return tokens, kinds


def _is_byte(token: str, rules: dict[str, Any]) -> bool:
    return (
        bool(rules["model"].get("byte_fallback")) and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
    )


def _write_special(writer: GGUFWriter, tokenizer: Any) -> None:
    for name in SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(framed) > len(bare) and framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(framed) > len(bare) and framed[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
