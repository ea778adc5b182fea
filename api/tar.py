"""A tar whose every byte is known from the members' names and sizes, so that any range of it can be streamed."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

BLOCK_BYTES = 512
_END = bytes(2 * BLOCK_BYTES)

Read = Callable[[int, int], Iterator[bytes]]


@dataclass(frozen=True)
class Member:
    """One file of the archive; `read(start, end)` gives its bytes."""

    name: str
    size_bytes: int
    read: Read


class Tar:
    """The layout of an archive; nothing is read before `chunks` is."""

    def __init__(self, members: Sequence[Member], modified_seconds: int) -> None:
        self._pieces: list[tuple[int, Read]] = []
        for member in members:
            header = _header(member, modified_seconds)
            self._add(header)
            self._pieces.append((member.size_bytes, member.read))
            self._add(bytes(-member.size_bytes % BLOCK_BYTES))
        self._add(_END)
        self._offsets = list(accumulate((size for size, _ in self._pieces), initial=0))
        self.size_bytes = self._offsets[-1]

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes [start, end) of the archive."""
        for offset, (size, read) in zip(self._offsets, self._pieces, strict=False):
            first, last = max(start - offset, 0), min(end - offset, size)
            if first < last:
                yield from read(first, last)

    def _add(self, content: bytes) -> None:
        def read(start: int, end: int) -> Iterator[bytes]:
            yield content[start:end]

        self._pieces.append((len(content), read))


def _header(member: Member, modified_seconds: int) -> bytes:
    """USTAR, with PAX records where the name or the size does not fit; the same bytes every time."""
    info = tarfile.TarInfo(member.name)
    info.size = member.size_bytes
    info.mtime = modified_seconds
    info.mode = 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)
