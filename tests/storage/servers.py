"""S3 servers for the tests: moto, which starts in a second and proves the code path; and what they have in common.

Moto takes any signature, so nothing here proves security with it: that is what `radosgw.py` is for.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import httpx

from storage.signing import Keys, presigned

_MOTO = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def make_bucket(self) -> str:
        """A new bucket's name."""
        name = f"bucket-{uuid4().hex[:12]}"
        self.ask("PUT", f"/{name}").raise_for_status()
        return name

    def ask(self, method: str, path: str, query: Mapping[str, str] | None = None) -> httpx.Response:
        """What the server answers to a signed request of our own."""
        url = presigned(
            method,
            self.endpoint + path,
            Keys(self.access_key, self.secret_key),
            region="us-east-1",
            expires_seconds=60,
            now=datetime.now(UTC),
            query=query or {},
        )
        return httpx.request(method, url)


@contextmanager
def moto() -> Iterator[S3Server]:
    # Its own process: it keeps global state, and its threads' sockets would warn in ours.
    with subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "moto's server did not start"
        yield S3Server(f"http://127.0.0.1:{port}", "moto-access", "moto-secret")
        process.kill()
