"""The streamed archive against Python's own reader, whole and in every slice."""

import io
import tarfile
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from api.tar import Member, Tar

names = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=120
).filter(lambda name: name not in {".", ".."} and not name.endswith(" "))
contents = st.dictionaries(names, st.binary(max_size=2000), max_size=4)


def _tar(files: dict[str, bytes]) -> Tar:
    def member(name: str, content: bytes) -> Member:
        def read(start: int, end: int) -> Iterator[bytes]:
            yield content[start:end]

        return Member(f"job/{name}", len(content), read)

    return Tar([member(name, content) for name, content in files.items()], 1_700_000_000)


def _bytes(tar: Tar, start: int, end: int) -> bytes:
    return b"".join(tar.chunks(start, end))


@given(files=contents)
def test_python_reads_back_what_was_put_in(files: dict[str, bytes]) -> None:
    tar = _tar(files)
    whole = _bytes(tar, 0, tar.size_bytes)
    assert len(whole) == tar.size_bytes
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        read = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert read == {f"job/{name}": content for name, content in files.items()}


@given(files=contents, cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_any_slice_is_that_slice_of_the_whole(files: dict[str, bytes], cuts: tuple[float, float]) -> None:
    tar = _tar(files)
    start, end = sorted(round(cut * tar.size_bytes) for cut in cuts)
    assert _bytes(tar, start, end) == _bytes(tar, 0, tar.size_bytes)[start:end]


def test_a_member_past_8_gib_keeps_its_size() -> None:
    size = 9 << 30
    tar = Tar([Member("large", size, lambda start, end: iter([b"\0" * (end - start)]))], 0)
    info = tarfile.TarFile(fileobj=io.BytesIO(_bytes(tar, 0, 4096))).next()
    assert info is not None
    assert (info.name, info.size) == ("large", size)
    assert tar.size_bytes > size
