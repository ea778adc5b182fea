"""Records as token ids, each with whether it is learned."""

from collections.abc import Iterator
from typing import Any

from models.quoting import quoted
from squeeze.errors import DataUnusable
from squeeze.texts.records import Chat, Exchange, Record, Text

Tokens = tuple[list[int], list[bool]]  # ids, and whether each is learned


def tokens_of(tokenizer: Any, record: Record, where: str) -> Tokens:
    """A text and a completion end with the end-of-text token; a chat ends as its template has it.

    A prompt and its completion are made into tokens apart, as they are when the model goes on from the prompt alone.
    """
    if isinstance(record, Text):
        ids = _ended(tokenizer, list(tokenizer(record.text, verbose=False)["input_ids"]))
        return ids, [True] * len(ids)
    if isinstance(record, Exchange):
        before = list(tokenizer(record.prompt, verbose=False)["input_ids"])
        if before and before[-1] == tokenizer.eos_token_id and record.prompt:
            before.pop()  # tokenizers that end every text end the prompt too
        after = _ended(tokenizer, tokenizer(record.completion, add_special_tokens=False, verbose=False)["input_ids"])
        return [*before, *after], [False] * len(before) + [True] * len(after)
    return _chat(tokenizer, record, where)


def pieces_of(tokens: Tokens, length: int, *, cut: bool) -> Iterator[Tokens]:
    """In pieces of at most so many tokens; where it is not to be `cut` into several, its beginning."""
    ids, scored = tokens
    for start in range(0, len(ids) if cut else 1, length):
        yield ids[start : start + length], scored[start : start + length]


def labelled_tokens(tokenizer: Any, text: str, number: int, length: int) -> tuple[Tokens, bool]:
    """(the text's tokens and the number of its label, which alone is learned; whether the text was cut).

    The text is made into tokens as it is when the classifier is asked, and ends where classifiers of transformers look:
    at the last token that doesn't fill up. It is cut as the tokenizer cuts, most of which keep the beginning.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    cut = len(ids) >= length
    if cut:
        ids = list(tokenizer(text, truncation=True, max_length=length - 1)["input_ids"])
    filler = filler_of(tokenizer)
    while len(ids) > 1 and ids[-1] == filler:
        ids.pop()
    return ([*ids, number], [False] * len(ids) + [True]), cut


def filler_of(tokenizer: Any) -> int | None:
    """The token that fills shorter texts of a batch up for a classifier: the tokenizer's own, or that which ends texts,
    or none.
    """
    own: int | None = tokenizer.pad_token_id
    end: int | None = tokenizer.eos_token_id
    return end if own is None else own


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return [*ids, end] if end is not None and (not ids or ids[-1] != end) else list(ids)


def _chat(tokenizer: Any, chat: Chat, where: str) -> Tokens:
    if not tokenizer.chat_template:
        raise DataUnusable(
            f"{where} is a chat, and the model has no chat template that says how one is written. Give `prompt` and "
            "`completion` instead, or a model with a template"
        )
    whole, spans = _spans(tokenizer, chat, where)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = [
        end > start and any(first <= start and end <= last for first, last in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), scored


def _spans(tokenizer: Any, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat as its template writes it, and from where to where the assistant speaks, in characters.

    The template is asked for the chat up to each such turn and past it. What stands between is the turn, with what ends
    it; what only announces it is not.
    """

    def written(count: int, *, announced: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(chat.messages[:count]), tokenize=False, add_generation_prompt=announced
                )
            )
        except Exception as error:
            raise DataUnusable(f"{where}: the model's chat template refuses it: {quoted(error, 200)}") from error

    whole, spans = written(len(chat.messages), announced=False), []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant" or number < chat.learned_from:
            continue
        before = written(number, announced=True) if number else ""
        past = written(number + 1, announced=False)
        if not whole.startswith(past) or not past.startswith(before):
            raise DataUnusable(
                f"{where}: the model's chat template writes earlier turns another way once others follow, so that they "
                "can't be told apart; end the chat after the assistant's first turn"
            )
        spans.append((len(before), len(past)))
    return whole, spans
