"""JSON lines over a socket pair: how the child that runs a job and its supervisor talk.

The supervisor sends one line, the request. The child answers with lines that each have one of these members:
`expect`, `stage`, `advance`, `event`, `kept`, `revision`, `failed`, `done`.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from squeeze.objects import Stage

Message = dict[str, Any]

_READ_BYTES = 1 << 16
_ADVANCE_SECONDS = 0.1  # a block's or a chunk's end may come thousands of times a second
_EVENT_CHARACTERS = 2000


class Channel:
    """One end of the pair."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self.closed = False

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: Message) -> None:
        """Sends a line, whole; waits while the other side reads too slowly."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._end.sendall(line)

    def receive(self) -> Message:
        """Waits for one line; EOFError where the other side has gone."""
        while True:
            for message in self._lines(1):
                return message
            if self.closed:
                raise EOFError("the other side of the channel has gone")
            self._fill(0)

    def drain(self) -> Iterator[Message]:
        """The lines that are there now, without waiting; `closed` is true once the other side has gone."""
        while not self.closed and self._fill(socket.MSG_DONTWAIT):
            pass
        yield from self._lines()

    def close(self) -> None:
        self._end.close()

    def _fill(self, flags: int) -> bool:
        try:
            part = self._end.recv(_READ_BYTES, flags)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # the other side died with lines of ours unread
            part = b""
        self.closed = not part
        self._buffer += part
        return True

    def _lines(self, limit: int | None = None) -> Iterator[Message]:
        count = 0
        while (limit is None or count < limit) and (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            count += 1
            yield json.loads(line)


class Teller:
    """Tells the supervisor where the work stands: `models.progress.Notify` over a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._told_at = 0.0

    def expect(self, work: Mapping[str, float]) -> None:
        self._channel.send({"expect": dict(work)})

    def stage(self, stage: Stage) -> None:
        self._told_at = 0.0
        self._channel.send({"stage": stage.value})

    def advance(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if done < total and now - self._told_at < _ADVANCE_SECONDS:
            return
        self._told_at = now
        self._channel.send({"advance": [done, total, unit]})

    def event(self, kind: str, message: str, **data: Any) -> None:
        self._channel.send({"event": kind, "message": message[:_EVENT_CHARACTERS], "data": data})

    def kept(self, checkpoint: Path) -> None:
        self._channel.send({"kept": str(checkpoint)})

    def revision(self, commit: str) -> None:
        """The commit that the model's id resolved to."""
        self._channel.send({"revision": commit})
