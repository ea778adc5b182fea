"""Bodies that are too large are refused before they are sent, over a raw socket."""

import socket

from tests.api.serving import Running


def _answer(connection: socket.socket) -> bytes:
    connection.settimeout(20)
    held = b""
    while b"\r\n\r\n" not in held or b"}" not in held:
        received = connection.recv(65536)
        if not received:
            break
        held += received
    return held


def test_a_gigabyte_is_refused_before_any_of_it_is_sent(shared: Running) -> None:
    with socket.create_connection(shared.address) as connection:
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1073741824\r\n\r\n"
        )
        answer = _answer(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"application/problem+json" in answer
    assert b"body_too_large" in answer


def test_a_body_of_unknown_length_is_refused_once_it_is_too_large(shared: Running) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection(shared.address) as connection:
        connection.sendall(
            b"POST /v1/plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + chunk + chunk
        )
        answer = _answer(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer


def test_the_limit_holds_where_no_route_would_read_the_body(shared: Running) -> None:
    answer = shared.client.post("/nowhere", content=b"x" * 70_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
