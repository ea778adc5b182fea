"""A Hub that can be ill: `scripts/hub.py` with switches for what a network does to downloads.

Also runnable: `python -m tests.hub --repo org/name=DIR --port 0`.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from scripts.hub import Hub, HubFile, HubRepo, serve

_STEP_BYTES = 1 << 14


@dataclass
class Faults:
    """What is wrong now; tests change it while the Hub serves.

    break_after: bytes of each body after which the connection breaks. breaks_left: how often, None for always.
    hold_after: bytes of a large body after which it stands still until `let_go` is set. status: answered to everything.
    damage: a byte of every large body is wrong. ignore_range: every answer is the whole file.
    bare_listing: names of files, without sizes and digests.
    """

    break_after: int | None = None
    breaks_left: int | None = None
    hold_after: int | None = None
    let_go: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    damage: bool = False
    ignore_range: bool = False
    bare_listing: bool = False


class FaultyHub(Hub):
    """`faults` say what is wrong, `sent` tells the (path, first byte) of every body that was begun."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.faults = Faults()
        self.sent: list[tuple[str, int]] = []
        self.asked: list[tuple[str, str]] = []

    def add_files(self, name: str, files: Mapping[str, bytes], directory: Path) -> HubRepo:
        """A model of these files, which are written to the directory."""
        for file, content in files.items():
            (directory / file).write_bytes(content)
        return self.add(name, directory)

    def refuses(self, method: str, path: str) -> int | None:
        self.asked.append((method, path))
        return self.faults.status

    def tells_sizes(self) -> bool:
        return not self.faults.bare_listing

    def ranged(self, header: str) -> str:
        return "" if self.faults.ignore_range else header

    def transmit(self, handler: BaseHTTPRequestHandler, file: HubFile, start: int, end: int) -> None:
        self.sent.append((file.path.name, start))
        faults = self.faults
        if file.sha256 is None:
            super().transmit(handler, file, start, end)
            return
        content = bytearray(file.path.read_bytes()[start:end])
        if faults.damage and content:
            content[-1] ^= 0xFF
        stop = len(content)
        if faults.break_after is not None and faults.breaks_left != 0:
            stop = min(stop, faults.break_after)
            faults.breaks_left = None if faults.breaks_left is None else faults.breaks_left - 1
        for at in range(0, stop, _STEP_BYTES):
            if faults.hold_after is not None and at >= faults.hold_after:
                faults.let_go.wait(60)
            handler.wfile.write(content[at : min(at + _STEP_BYTES, stop)])
        if stop < len(content):
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(2)


if __name__ == "__main__":
    serve(__doc__, FaultyHub)
