"""Multipart forms as they stream in: fields and one file at a time, nothing spooled, bounded memory."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from squeeze.errors import BodyInvalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD_BYTES = 4096
PARTS_AT_MOST = 16


@dataclass
class Part:
    """One part of the form: a field with its value, or a file (`filename` is not None) whose data follows."""

    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)
    pending: deque[bytes] = field(default_factory=deque)
    over: bool = False


class Form:
    """Reads a form in its own order: `for part in form:`; of a file, take `form.data()` before the next part."""

    def __init__(self, content_type: str | None, chunks: Iterable[bytes]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise BodyInvalid(
                "Send a form: `Content-Type: multipart/form-data` with the parts `file` and `purpose`, "
                "for example `curl -F purpose=calibration -F file=@texts.jsonl`."
            )
        self._chunks = iter(chunks)
        self._parts: deque[Part] = deque()
        self._current = Part()
        self._header = [bytearray(), bytearray()]
        self._seen = 0
        self._complete = False
        self._parser = self._open_parser(boundary)

    def __iter__(self) -> Iterator[Part]:
        while True:
            while not self._parts:
                if not self._feed():
                    return
            yield self._parts.popleft()

    def data(self, part: Part) -> Iterator[bytes]:
        """The bytes of a file part, as they come."""
        while True:
            while part.pending:
                yield part.pending.popleft()
            if part.over or not self._feed():
                return

    def _feed(self) -> bool:
        """One more chunk of the body through the parser; False at its end."""
        chunk = next(self._chunks, b"")
        if not chunk:
            if not self._complete:
                raise BodyInvalid("The form ends before its closing boundary. Send it again.")
            return False
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BodyInvalid(f"The form can't be read: {error}.") from error
        return True

    def _open_parser(self, boundary: bytes) -> MultipartParser:
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._take_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._take_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take_data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }
        try:
            return MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise BodyInvalid(f"The form can't be read: {error}.") from error

    def _begin(self) -> None:
        self._seen += 1
        if self._seen > PARTS_AT_MOST:
            raise BodyInvalid(f"The form has more than {PARTS_AT_MOST} parts.")
        self._current = Part()

    def _take_header(self, side: int, data: bytes) -> None:
        self._header[side] += data

    def _end_header(self) -> None:
        name, value = (bytes(side) for side in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._current.name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options:
            self._current.filename = options[b"filename"].decode(errors="replace")

    def _end_headers(self) -> None:
        if self._current.filename is not None:
            self._parts.append(self._current)

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._current.filename is not None:
            self._current.pending.append(data[start:end])
            return
        if len(self._current.value) + end - start > FIELD_BYTES:
            raise BodyInvalid(f"The part `{self._current.name}` is longer than {FIELD_BYTES} bytes; is it the file?")
        self._current.value += data[start:end]

    def _end(self) -> None:
        self._current.over = True
        if self._current.filename is None:
            self._parts.append(self._current)

    def _finish(self) -> None:
        self._complete = True
