"""What a full disk does to writing: the error that says so, and files that are there whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from squeeze.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_faults() -> Iterator[None]:
    """Turns what the system says of a full disk, by itself or through safetensors, into DiskFull."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if says_full(str(error)):
            raise DiskFull("the disk filled up while the model was written; free space and retry the job") from error
        raise


def says_full(message: str) -> bool:
    """The words of the system for a full disk or quota are in a message."""
    return any(os.strerror(number) in message for number in FULL)


def write_once(path: Path, text: str) -> None:
    """As `write_whole`, unless that is what stands there: others may be reading it."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that takes its place in one step."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
