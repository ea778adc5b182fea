"""Uploaded parquet, read by a process of its own with little memory and time (`squeeze.texts.parquet`)."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import NamedTemporaryFile

from squeeze.errors import DataUnusable
from squeeze.texts.documents import LONGEST_RECORD, Row
from storage.base import Storage

SECONDS = 20.0  # that its process lives at most; most of them are for its start, on a machine that is busy
FOOTER_BYTES = 8  # at a file's very end: the length of what stands before, and PAR1
MOST_DESCRIBED = 16 << 20  # bytes before the footer, which say where everything lies


class Table:
    """An uploaded file's records. records: of all of it, once `rows` has begun; None where it doesn't say.
    whole: once `rows` has ended, whether they were all.
    """

    def __init__(self, storage: Storage, key: str, most_bytes: int) -> None:
        """most_bytes: from the start, that are looked at."""
        self._storage, self._key, self._most = storage, key, most_bytes
        self.records: int | None = None
        self.whole = False

    def rows(self, column: str | None, label: str | None) -> Generator[Row]:
        """As `squeeze.texts.parquet.parquet_rows`, of the beginning; none where its process did not end by itself."""
        with self._beginning() as path:
            if path is None:
                return
            present = min(self._most, self._storage.size(self._key))
            told = [str(path), str(present), json.dumps(column), json.dumps(label)]
            with _reading([sys.executable, "-m", "squeeze.texts.parquet", *told]) as lines:
                for line in lines:
                    found = json.loads(line)
                    if isinstance(found, list):
                        yield found[0], found[1]
                    elif "refused" in found:
                        raise DataUnusable(found["refused"])
                    elif "records" in found:
                        self.records = found["records"]
                    else:
                        self.whole = found["whole"]

    @contextmanager
    def _beginning(self) -> Iterator[Path | None]:
        """A file with what is looked at and what says where it lies, in their places; between them a hole. None where
        the latter is too long.
        """
        if (local := self._storage.local_path(self._key)) is not None:
            yield local
            return
        size = self._storage.size(self._key)
        footer = b"".join(self._storage.read(self._key, max(0, size - FOOTER_BYTES)))
        described = int.from_bytes(footer[:4], "little") + FOOTER_BYTES
        if described > MOST_DESCRIBED:
            yield None
            return
        with NamedTemporaryFile(suffix=".parquet") as file:
            for start, end in ((0, min(self._most, size)), (max(0, size - described), size)):
                file.seek(start)
                for chunk in self._storage.read(self._key, start, end):
                    file.write(chunk)
            file.flush()
            yield Path(file.name)


@contextmanager
def _reading(command: list[str]) -> Iterator[Iterator[bytes]]:
    """The lines that a process writes, which is given our path and none of our secrets, until one is too long; it ends
    with the block.
    """
    environ = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ) as process:
        assert process.stdout is not None, "it is a pipe"
        watch = threading.Timer(SECONDS, process.kill)
        watch.start()
        try:
            lines = iter(partial(process.stdout.readline, LONGEST_RECORD), b"")
            yield takewhile(lambda line: line.endswith(b"\n"), lines)
        finally:
            watch.cancel()
            process.kill()
