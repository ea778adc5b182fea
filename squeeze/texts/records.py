"""What the records of training data hold: texts, prompts with their completions, chats; or what is wrong with them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from squeeze.errors import DataUnusable
from squeeze.texts.documents import Row, Wrong, passages, refuse, said, wanted_of

DATA, EVALUATION = "data.source", "evaluation.source"
MOST_TOLD = 10  # wrong records of one file

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


@contextmanager
def blamed(param: str) -> Iterator[None]:
    """Has an error of a text name the field of the request that names the text."""
    try:
        yield
    except DataUnusable as error:
        error.param = param
        raise


class Faults:
    """Takes what is wrong with the records of a file, so that all of it is told at once, but for what is too much."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __call__(self, error: DataUnusable) -> None:
        self._messages.append(error.message)
        if len(self._messages) == MOST_TOLD:
            raise DataUnusable("\n".join([*self._messages, f"Nothing behind the {MOST_TOLD}th was looked at."]))

    def refuse_any(self) -> None:
        """Raises DataUnusable where there were some."""
        if self._messages:
            raise DataUnusable("\n".join(self._messages))


def records_in(
    rows: Iterable[Row], column: str | None, grain: int, wrong: Wrong = refuse
) -> Iterator[tuple[str, Record]]:
    """Every record of a file's rows with where it stands; running text in pieces of `grain` characters.

    wrong: is told of a row that is no record.
    """
    for where, row in rows:
        if isinstance(row, str):
            yield from (("a passage", Text(passage)) for passage in passages([row], grain))
            continue
        try:
            found = record_of(row, column, where)
        except DataUnusable as error:
            wrong(error)
            continue
        if found is not None:
            yield where, found


def refuse_too_few(count: int, *, apart: bool) -> None:
    """Raises where a split of so many records would leave a side empty. apart: what is held out is another text."""
    if count == 0:
        raise DataUnusable("the training data has no records: it is empty", param=DATA)
    if count == 1 and not apart:
        raise DataUnusable(
            "the training data has one record; at least 2 are needed, one to learn and one to hold out, and some "
            "hundreds do well. Add more, or name a text of its own as evaluation.source.",
            param=DATA,
        )


def refuse_nothing_held_out(count: int) -> None:
    """count: of the records of a text of its own that is held out."""
    if count == 0:
        raise DataUnusable("the evaluation text has no records: it is empty", param=EVALUATION)


def record_of(record: object, column: str | None, where: str) -> Record | None:
    """column: the one field to look at; None: the usual ones. where: of the record in its file, for the error.

    None where all fields are null. Raises DataUnusable where it holds nothing that could be learned.
    """
    fields = dict(record) if isinstance(record, Mapping) else {}
    names, wanted = wanted_of(column)
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    if not given:
        if any(name in fields for name in names):
            return None
        raise DataUnusable(f"{where} of the file has none of {wanted}")
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
