"""A proxy in front of the real API that does what networks do: cuts answers, refuses, loses, falsifies."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Cut:
    """Passes the answer's first bytes on, then closes the connection."""

    after_bytes: int


@dataclass(frozen=True)
class Refuse:
    """Answers in the service's place."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lose:
    """Lets the service do what was asked for, and drops the answer."""


@dataclass(frozen=True)
class Falsify:
    """Changes a byte of the answer's body."""


Fault = Cut | Refuse | Lose | Falsify


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Proxy:
    """Faults are used up one a request, in order, on paths that hold `on`; afterwards everything passes."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    on: str = ""
    seen: list[Seen] = field(default_factory=list)


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    upstream = urlsplit(target)
    assert upstream.hostname is not None

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            state.seen.append(Seen(self.command, self.path, dict(self.headers)))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = state.faults.pop(0) if state.faults and state.on in self.path else None
            if isinstance(fault, Refuse):
                self.send_response(fault.status)
                for name, value in {"Content-Length": "0", **fault.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
            connection.request(self.command, self.path, body or None, dict(self.headers))
            answer = connection.getresponse()
            if isinstance(fault, Lose):
                answer.read()
                connection.close()
                self._hang_up()
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self._relay(answer, fault)
            connection.close()
            self._hang_up()

        do_GET = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815 - the names that http.server looks for

        def _relay(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
            left = fault.after_bytes if isinstance(fault, Cut) else None
            while left is None or left > 0:
                chunk = answer.read1(65536 if left is None else left)
                if not chunk:
                    return
                if isinstance(fault, Falsify):
                    chunk, fault = bytes([chunk[0] ^ 1]) + chunk[1:], None
                try:
                    self.wfile.write(chunk)
                except OSError:
                    return  # the client went away
                left = None if left is None else left - len(chunk)

        def _hang_up(self) -> None:
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
