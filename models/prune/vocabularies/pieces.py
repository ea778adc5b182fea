"""A tokenizer's vocabulary as `tokenizer.json` has it: which tokens each token is made of, and the same with fewer.

Known are BPE (over bytes, or over characters with bytes or an unknown token for the rest) and Unigram. The guarantee
rests on this: BPE applies, of the merges that are possible, the one that stands first. Where every merge that was
applied to a text stays, and of the others some go, the first one possible is at every step the same one. A token is
merged within itself alone, whatever stands around it, so that what it is made of tells which merges those are. Of
Unigram the likeliest division stays the likeliest when others go; the penalty of what is unknown hangs on the least
score of all, so that a piece of that score stays.
"""

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from squeeze.errors import ArchitectureUnsupported

Rules = dict[str, Any]  # tokenizer.json
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
SPACE = "▁"  # what SentencePiece has for a space


class Pieces:
    """The tokens of a model, not those that were added to it. Raises ArchitectureUnsupported where it is another kind.

    numbers: of each, by its text.
    """

    def __init__(self, rules: Rules) -> None:
        refuse_unknown(rules)
        model = rules["model"]
        self._rules, self._unigram = rules, model["type"] == "Unigram"
        if self._unigram:
            self._scores = [float(score) for _, score in model["vocab"]]
            self.numbers = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
            self._ranks: dict[tuple[str, str], int] = {}
        else:
            self.numbers = dict(model["vocab"])
            self._ranks = {pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))}
        self._texts = {number: piece for piece, number in self.numbers.items()}

    def basic(self) -> set[int]:
        """Numbers of the tokens that any text can be told with: bytes or characters, what stands for a space or for
        what is unknown, and of Unigram one piece of the least score.
        """
        model, found = self._rules["model"], {SPACE}
        if bytes_are_characters(self._rules):
            found |= set(ByteLevel.alphabet())
        elif model.get("byte_fallback"):
            found |= set(BYTES)
        else:
            found |= {piece for piece in self.numbers if len(piece) == 1}
        numbers = {self.numbers[piece] for piece in found if piece in self.numbers}
        unknown = model.get("unk_id") if self._unigram else self.numbers.get(model.get("unk_token") or "")
        if unknown is not None:
            numbers.add(unknown)
        if self._unigram:
            numbers.add(min(range(len(self._scores)), key=self._scores.__getitem__))
        return numbers

    def parts(self, number: int) -> set[int]:
        """Numbers of all tokens that come up while this one is made, itself included; of what no merge makes, as of
        added tokens, it alone.
        """
        piece = self._texts.get(number)
        if self._unigram or piece is None:
            return {number}
        symbols, seen = list(piece), set(piece)
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            place = min(range(len(pairs)), key=lambda n: self._ranks.get(pairs[n], len(self._ranks)))
            if pairs[place] not in self._ranks:
                break
            symbols[place : place + 2] = ["".join(pairs[place])]
            seen.add(symbols[place])
        if len(symbols) > 1 or not seen <= self.numbers.keys():
            return {number}
        return {self.numbers[each] for each in seen}

    def by_rank(self) -> Iterator[int]:
        """Numbers of all tokens, those first that were the most frequent when the tokenizer was made: by the order of
        the merges, or by their scores; then those that no merge makes.
        """
        if self._unigram:
            yield from sorted(range(len(self._scores)), key=lambda number: -self._scores[number])
            return
        told: set[str] = set()
        for pair in self._ranks:
            piece = "".join(pair)
            if piece in self.numbers and piece not in told:
                told.add(piece)
                yield self.numbers[piece]
        yield from sorted(number for piece, number in self.numbers.items() if piece not in told)


def refuse_unknown(rules: Rules) -> None:
    """Raises ArchitectureUnsupported where nobody knows which tokens a text needs."""
    model = rules["model"]
    kind, what = model.get("type"), ""
    if kind not in ("BPE", "Unigram"):
        what = f"its model is {kind}"
    elif model.get("dropout"):
        what = f"it leaves out merges by chance (dropout {model['dropout']})"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        what = "it marks the middle or the end of words"
    if what:
        raise ArchitectureUnsupported(
            f"the tokenizer of this model can't be trimmed: {what}. BPE and Unigram can, without dropout and marks; "
            "take the method depth or width",
            param="method",
        )


def bytes_are_characters(rules: Rules) -> bool:
    """Whether every byte of a text is written as a character of its own, as GPT-2 has it."""
    parts = [*_parts(rules.get("pre_tokenizer"), "pretokenizers"), *_parts(rules.get("normalizer"), "normalizers")]
    return any(part["type"] == "ByteLevel" for part in parts)


def trimmed(rules: Rules, numbers: Mapping[int, int]) -> Rules:
    """`tokenizer.json` with the tokens that stay, and their merges in the order they had. numbers: the new of each old
    number that stays, rising.
    """
    left = copy.deepcopy({name: value for name, value in rules.items() if name != "model"})
    left["model"] = model = dict(rules["model"])
    vocab = model["vocab"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(vocab) if number in numbers]
        if model.get("unk_id") is not None:
            model["unk_id"] = numbers[model["unk_id"]]
    else:
        kept = {piece: numbers[number] for piece, number in vocab.items() if number in numbers}
        model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
        model["merges"] = [merge for merge in model["merges"] if merge_stays(_pair(merge), kept)]
    for added in left.get("added_tokens") or []:
        added["id"] = numbers[added["id"]]
    _renumber_processor(left.get("post_processor"), numbers)
    if left.get("padding"):
        left["padding"]["pad_id"] = numbers.get(left["padding"]["pad_id"], 0)
    return left


def merge_stays(pair: tuple[str, str], kept: Mapping[str, int]) -> bool:
    """Whether what it joins and what it makes do."""
    return pair[0] in kept and pair[1] in kept and "".join(pair) in kept


def named_by(rules: Rules) -> set[int]:
    """Numbers of tokens that `tokenizer.json` names beside its model's."""
    found = {added["id"] for added in rules.get("added_tokens") or []}
    for part in _parts(rules.get("post_processor"), "processors"):
        found |= {part[name][1] for name in ("sep", "cls") if name in part}
        for special in (part.get("special_tokens") or {}).values():
            found |= set(special["ids"])
    return found


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _renumber_processor(processor: dict[str, Any] | None, numbers: Mapping[int, int]) -> None:
    for part in _parts(processor, "processors"):
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], numbers[part[name][1]]]
        for special in (part.get("special_tokens") or {}).values():
            special["ids"] = [numbers[number] for number in special["ids"]]


def _parts(rule: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a rule, in turn."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [part for each in rule[inner] for part in _parts(each, inner)]
    return [rule]
