"""SentencePiece's own file of a tokenizer (`tokenizer.model`) with some of its pieces left out.

The file is one message of protocol buffers (`ModelProto` of sentencepiece_model.proto): field 1 holds a piece each, in
the order of their numbers, field 2 says how it was trained, and there how many pieces there are and which of them begin
a text, end it, fill it up or stand for what is unknown. All else is copied as it stands.
"""

from collections.abc import Iterator, Mapping

PIECES, TRAINED = 1, 2  # fields of the message
TEXT = 1  # field of a piece
COUNT = 4  # field of how it was trained
SPECIAL = {40: 0, 41: 1, 42: 2, 43: -1}  # unknown, begin, end, filler: numbers where the file says none
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def pieces_of(content: bytes) -> list[str] | None:
    """Texts of the pieces by their numbers; None where the file is no such message."""
    found = []
    try:
        for field, kind, body, _ in _fields(content):
            if field == PIECES:
                if kind != BYTES:
                    return None
                found.append(next(value.decode() for name, _, value, _ in _fields(body) if name == TEXT))
    except (ValueError, StopIteration):
        return None
    return found or None


def trimmed(content: bytes, numbers: Mapping[int, int]) -> bytes:
    """The file with the pieces that stay. numbers: the new of each old number that stays, rising."""
    out, place, count = [], 0, sum(field == PIECES for field, *_ in _fields(content))
    left = sum(number in numbers for number in range(count))
    for field, _, body, raw in _fields(content):
        if field == PIECES:
            if place in numbers:
                out.append(raw)
            place += 1
        elif field == TRAINED:
            told = _retold(body, left, numbers)
            out.append(_varint(TRAINED << 3 | BYTES) + _varint(len(told)) + told)
        else:
            out.append(raw)
    return b"".join(out)


def _retold(body: bytes, count: int, numbers: Mapping[int, int]) -> bytes:
    """How it was trained, with the new numbers."""
    special = dict(SPECIAL)
    out = []
    for field, kind, value, raw in _fields(body):
        if field in SPECIAL and kind == VARINT:
            special[field] = _signed(value)
        elif field != COUNT:
            out.append(raw)
    out.append(_varint(COUNT << 3 | VARINT) + _varint(count))
    for field, number in special.items():
        out.append(_varint(field << 3 | VARINT) + _varint(numbers.get(number, number) % (1 << 64)))
    return b"".join(out)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """(number, kind, value, all of it) of each field. Raises ValueError where it is no message."""
    start = 0
    while start < len(message):
        tag, place = _read_varint(message, start)
        kind = tag & 7
        if kind == VARINT:
            _, end = _read_varint(message, place)
        elif kind == BYTES:
            size, place = _read_varint(message, place)
            end = place + size
        elif kind in (FIXED64, FIXED32):
            end = place + (8 if kind == FIXED64 else 4)
        else:
            raise ValueError(f"a field of the kind {kind}")
        if end > len(message):
            raise ValueError("a field that is cut off")
        yield tag >> 3, kind, message[place:end], message[start:end]
        start = end


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("a number that is cut off")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _signed(value: bytes) -> int:
    number = _read_varint(value, 0)[0]
    return number - (1 << 64) if number >= 1 << 63 else number
