"""The load that `benchmarks/service.py` puts on a server, from a process of its own.

    python benchmarks/load.py requests URL METHOD COUNT CONNECTIONS SECONDS [BODY]
    python benchmarks/load.py download URL

Prints one line of JSON. Standard library only, and sockets rather than a client: it must be quicker than what it asks.
"""

import http.client
import json
import socket
import sys
import threading
import time
from urllib.parse import urlsplit
from uuid import uuid4

BUFFER_BYTES = 1 << 20


def requests(
    url: str, method: str, count: int, connections: int, seconds: float, body: str | None
) -> dict[str, object]:
    """At most `count` requests in at most `seconds`, over connections that are kept; how soon each was answered."""
    parts = urlsplit(url)
    until = time.monotonic() + seconds
    took: list[float] = []
    wrong: list[int] = []

    def one(share: int) -> None:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30.0)
        for _ in range(share):
            began = time.monotonic()
            if began > until:
                break
            headers = {"Content-Type": "application/json", "Idempotency-Key": uuid4().hex} if body else {}
            connection.request(method, parts.path, body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status in {200, 202}:
                took.append(time.monotonic() - began)
            else:
                wrong.append(answer.status)
        connection.close()

    threads = [threading.Thread(target=one, args=(count // connections,)) for _ in range(connections)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.monotonic() - began, "took": sorted(took), "wrong": wrong}


def download(url: str) -> dict[str, object]:
    """The body of one GET, thrown away as it comes."""
    parts = urlsplit(url)
    began = time.monotonic()
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60.0) as connection:
        connection.sendall(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        buffer = bytearray(BUFFER_BYTES)
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        head, _, rest = head.partition(b"\r\n\r\n")
        size_bytes = len(rest)
        while got := connection.recv_into(buffer):
            size_bytes += got
    return {"status": int(head.split()[1]), "bytes": size_bytes, "seconds": time.monotonic() - began}


def main(what: str, url: str, *rest: str) -> None:
    if what == "download":
        print(json.dumps(download(url)))
        return
    method, count, connections, seconds, *body = rest
    print(json.dumps(requests(url, method, int(count), int(connections), float(seconds), body[0] if body else None)))


if __name__ == "__main__":
    main(*sys.argv[1:])
