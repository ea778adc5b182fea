"""The plain directory with its weight files under zstd, each for itself: less to store and to send, nothing to load.

`zstd -d --rm *.zst` makes the plain directory of it again, to the byte; `sha256sum -c SHA256SUMS` proves that. For
weights with many zeros, which no format that engines load holds in less room.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from models.files.checkpoint import SourceModel
from models.formats import safetensors
from models.formats.directory import written_whole
from models.progress import Notify
from models.weights.plain import Plain
from models.weights.quantized import QuantizedModel, Site
from squeeze.steps.schemes import Scheme

SUFFIX = ".zst"
SUMS = "SHA256SUMS"
LEVEL = 3  # zstd's own default
CHUNK_BYTES = 4 << 20


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """It holds whatever safetensors does."""
    safetensors.refuse(sites, schemes)


def write(source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify) -> None:
    """As `models.formats.safetensors` writes it, then file by file under zstd."""
    with written_whole(out) as partial:
        plain = partial / "plain"
        safetensors.write(source, quantized, plain, notify)
        pack(plain, partial)


def write_packed(plain: Path, out: Path) -> None:
    """As `write`, of a plain directory, which stays."""
    with written_whole(out) as partial:
        shutil.copytree(plain, partial / "plain")
        pack(partial / "plain", partial)


def read(out: Path, module: str) -> Plain:
    with restored(out) as plain:
        return safetensors.read(plain, module)


def pack(plain: Path, out: Path) -> None:
    """Moves what is in one directory to another, weights under zstd."""
    sums = []
    for file in sorted(plain.iterdir()):
        if file.suffix != ".safetensors":
            file.rename(out / file.name)
            continue
        sums.append(f"{_packed(file, out / (file.name + SUFFIX))}  {file.name}\n")
        file.unlink()
    plain.rmdir()
    (out / SUMS).write_text("".join(sums), encoding="utf-8")


@contextmanager
def restored(directory: Path) -> Iterator[Path]:
    """The plain directory, beside the packed one, for as long as it is needed. Raises ValueError where a weight file
    is not what was packed.
    """
    import pyarrow  # only where a file is unpacked: it costs 25 MB

    with tempfile.TemporaryDirectory(prefix=".restored-", dir=directory.parent) as name:
        plain = Path(name)
        sums = dict(line.split("  ")[::-1] for line in (directory / SUMS).read_text(encoding="utf-8").splitlines())
        for file in directory.iterdir():
            if file.suffix != SUFFIX:
                shutil.copyfile(file, plain / file.name)
                continue
            with pyarrow.CompressedInputStream(str(file), "zstd") as packed, (plain / file.stem).open("wb") as weights:
                digest = hashlib.sha256()
                while chunk := packed.read(CHUNK_BYTES):
                    digest.update(chunk)
                    weights.write(chunk)
            if digest.hexdigest() != sums[file.stem]:
                raise ValueError(f"{file.name} does not hold what was packed")
        yield plain


def _packed(file: Path, out: Path) -> str:
    """Writes a file under zstd, a frame for each chunk; the SHA-256 of what is in it."""
    import pyarrow  # only where a file is packed: it costs 25 MB

    digest, codec = hashlib.sha256(), pyarrow.Codec("zstd", compression_level=LEVEL)
    with file.open("rb") as weights, out.open("wb") as packed:
        while chunk := weights.read(CHUNK_BYTES):
            digest.update(chunk)
            packed.write(codec.compress(chunk))
    return digest.hexdigest()
