"""What one record of training data holds: a text, a prompt with its completion, or a chat; or what is wrong with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.documents import COLUMNS, WANTED, said
from squeeze.errors import DataUnusable

Message = dict[str, str]  # role, content

# As datasets in ShareGPT's layout (`from`, `value`) name the speakers.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Text:
    """All of it is learned."""

    text: str


@dataclass(frozen=True)
class Exchange:
    """The completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """What the assistant says is learned, in the messages from number `learned_from` on."""

    messages: tuple[Message, ...]
    learned_from: int = 0


Record = Text | Exchange | Chat


def record_of(record: object, column: str | None, where: str) -> Record | None:
    """column: the one field to look at; None: the usual ones. where: of the record in its file, for the error.

    None where all fields are null. Raises DataUnusable where it holds nothing that could be learned.
    """
    fields = dict(record) if isinstance(record, Mapping) else {}
    names = COLUMNS if column is None else (column,)
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    if not given:
        if any(name in fields for name in names):
            return None
        raise DataUnusable(f"{where} of the file has none of {WANTED if column is None else f'`{column}`'}")
    for name in ("messages", "conversations", *([] if column is None else [column])):
        if isinstance(given.get(name), list):
            return _chat(given[name], [], where)
    if "prompt" in given or "completion" in given:
        return _exchange(given, where)
    name, value = next(iter(given.items()))
    if not isinstance(value, str):
        raise DataUnusable(f"{where}: `{name}` is no text")
    if not value.strip():
        raise DataUnusable(f"{where}: `{name}` is empty")
    return Text(_whole(value))


def row_of(record: Record) -> dict[str, Any]:
    """What `record_of` makes the record of."""
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Exchange):
        return {"prompt": record.prompt, "completion": record.completion}
    first = record.learned_from or 0
    messages = list(record.messages)
    return {"prompt": messages[:first], "completion": messages[first:]} if first else {"messages": messages}


def _exchange(given: Mapping[str, Any], where: str) -> Record:
    missing = [name for name in ("prompt", "completion") if name not in given]
    if missing:
        raise DataUnusable(f"{where} has no `{missing[0]}`; a prompt and its completion go together")
    prompt, completion = given["prompt"], given["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(prompt, completion, where)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataUnusable(f"{where}: `prompt` and `completion` are to be two texts, or two lists of messages")
    if not completion:
        raise DataUnusable(f"{where}: `completion` is empty, so that nothing of it would be learned")
    return Exchange(_whole(prompt), _whole(completion))


def _chat(before: list[Any], after: list[Any], where: str) -> Chat:
    messages = tuple(_message(one, f"{where}, message {n}") for n, one in enumerate([*before, *after], start=1))
    learned_from = len(before) if after else 0
    if not any(one["role"] == "assistant" for one in messages[learned_from:]):
        raise DataUnusable(f"{where} has no message of the assistant, so that nothing of it would be learned")
    return Chat(messages, learned_from)


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataUnusable(f"{where}: a message is an object with `role` and `content`")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or not role:
        raise DataUnusable(f"{where} has no `role`")
    if not any(value.get(name) is not None for name in ("content", "value")):
        raise DataUnusable(f"{where} has no `content`")
    return {"role": ROLES.get(role, role), "content": _whole(said(value))}


def _whole(text: str) -> str:
    """JSON can hold halves of characters, no encoding can."""
    return text.encode(errors="replace").decode()
