"""What a directory that was written with zeros in it holds, read back: how many, where, and what could be saved."""

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel, open_model
from models.formats.directory import WEIGHTS, weight_bytes
from models.formats.safetensors_zst import LEVEL
from models.weights.plain import CHUNK
from models.weights.quantized import QuantizedModel, Site
from squeeze.costs.work import ZSTD_BYTES
from squeeze.errors import CompressionBug
from squeeze.reports.report import Report, Sparsity
from squeeze.steps.sparsifying import Zeroes

PIECE_BYTES = 4 << 20  # compressed at once; larger pieces gain nothing where no two weights repeat


def counted_zeros(source: SourceModel, directory: Path, sites: Iterable[Site], step: Zeroes) -> Sparsity:
    """Of a written directory. sites: linears that have zeros. Raises CompressionBug where a row breaks the pattern."""
    written = open_model(directory)
    layers = weights = zeros = rows = 0
    for site in sites:
        weight = written.tensor(written.module_key(site.name, "weight"))
        weight = weight.t() if site.transposed else weight
        zeros += int((weight == 0).sum())
        weights += weight.numel()
        layers += 1
        if step.group is not None:
            rows += _valid_rows(weight, step.group, site.name)
    share = _share_read(max(source.weight_bytes, written.weight_bytes))
    return Sparsity(
        method=step.method,
        pattern=step.pattern,
        target=step.sparsity,
        layers=layers,
        weights=weights,
        zeros=zeros,
        reached=zeros / weights,
        of_model=zeros / written.parameters,
        rows_checked=rows if step.group is not None else None,
        weight_bytes=written.weight_bytes,
        zstd_bytes=zstd_bytes(written, share),
        zstd_bytes_before=zstd_bytes(source, share),
        zstd_share_read=float(share),
    )


def counted_codes(source: SourceModel, directory: Path, model: QuantizedModel) -> Sparsity:
    """As `counted_zeros`, of a step that quantizes too; of its codes, which every format stores as they are.

    directory: of one format, for its bytes.
    """
    step, weights, zeros, rows = model.step, 0, 0, 0
    for name in model.sites:
        weight = model.codes(name).dequantize(torch.float32)
        zeros += int((weight == 0).sum())
        weights += weight.numel()
        if step.group is not None:
            rows += _valid_rows(weight, step.group, name)
    size = weight_bytes(directory)
    share = _share_read(max(source.weight_bytes, size))
    files = sorted(file for pattern in WEIGHTS for file in directory.glob(pattern))
    return Sparsity(
        method=step.method,
        pattern=None if step.group is None else ":".join(map(str, step.group)),
        target=step.zeroed,
        layers=len(model.sites),
        weights=weights,
        zeros=zeros,
        reached=zeros / weights,
        of_model=zeros / source.parameters,
        rows_checked=rows if step.group is not None else None,
        weight_bytes=size,
        zstd_bytes=_compressed(chain.from_iterable(map(_read, files)), size, share),
        zstd_bytes_before=zstd_bytes(source, share),
        zstd_share_read=float(share),
        quantized=True,
    )


def saved_by_zeros(counted: Sparsity, *, in_fewer_bits: bool = False) -> str:
    """What the user should know first: what the zeros save, and what they don't. in_fewer_bits: the weights were stored
    in fewer bits than they came in, so that the files are smaller for that.
    """
    where = (
        f"in the pattern {counted.pattern}, which all {counted.rows_checked:,} rows hold to, "
        if counted.pattern
        else ""
    )
    if counted.quantized:
        return (
            f"{counted.reached:.1%} of the weights of {counted.layers} layers are zero {where}"
            f"({counted.of_model:.1%} of all parameters), in codes that take as many bits as any: the zeros make the "
            f"files no smaller and the model no faster than the rounding does. Under zstd the files take "
            f"{counted.zstd_bytes:,} of their {counted.weight_bytes:,} bytes"
        )
    kernels = (
        f"kernels for {counted.pattern} sparsity have to be asked for where the model is served"
        if counted.pattern
        else "no common kernel is faster for zeros that stand anywhere"
    )
    saved = f"{1 - counted.zstd_bytes / counted.zstd_bytes_before:.0%} less to store or to send"
    size = f"as large as before ({counted.weight_bytes:,} bytes)"
    if in_fewer_bits:
        saved += ", in part for fewer bits"
        size = f"smaller only for fewer bits ({counted.weight_bytes:,} bytes)"
    return (
        f"{counted.reached:.1%} of the weights of {counted.layers} layers are zero {where}"
        f"({counted.of_model:.1%} of all parameters), and the files are {size}, for a zero takes the room of any "
        f"number; the model is no faster where nothing uses them ({kernels}). What is real: under zstd the weights "
        f"take {counted.zstd_bytes:,} bytes, where the source's take {counted.zstd_bytes_before:,} ({saved})"
    )


def share_kept(report: Report, counts: Mapping[str, float]) -> float:
    """Share of the zeros that the step which the report is of left as they are. counts: of zeros before, by layer."""
    told = {layer.name: layer.zeros_kept for block in report.blocks for layer in block.layers}
    kept = sum(count * (1.0 if (one := told.get(name, 1.0)) is None else one) for name, count in counts.items())
    return kept / sum(counts.values())


def left_in(counted: Sparsity, kept: float) -> str:
    """What the user should know first, where a step that quantizes followed."""
    return f"{kept:.1%} of the zeros of {counted.method} are zero in the result; its files are no smaller for it"


def zstd_bytes(model: SourceModel, share: Fraction) -> int:
    """Bytes of all weights under zstd, a tensor at a time. share: of the pieces, evenly spaced, that are compressed for
    it; of the others the same is supposed.
    """
    pieces = (piece for name in model.names() for piece in _pieces(model.tensor(name)))
    return _compressed(pieces, model.weight_bytes, share)


def _compressed(pieces: Iterable[memoryview | bytes], size_bytes: int, share: Fraction) -> int:
    import pyarrow  # only where a file is counted: it costs 25 MB, and blocks are done by then

    codec = pyarrow.Codec("zstd", compression_level=LEVEL)
    seen = compressed = 0
    for number, piece in enumerate(pieces, start=1):
        if int(number * share) > int((number - 1) * share):
            seen += len(piece)
            compressed += len(codec.compress(piece))
    return round(compressed * size_bytes / seen) if seen else 0


def _read(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece


def _share_read(size_bytes: int) -> Fraction:
    return min(Fraction(1), Fraction(ZSTD_BYTES, size_bytes))


def _pieces(tensor: Tensor) -> Iterable[memoryview]:
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), PIECE_BYTES):
        yield flat[start : start + PIECE_BYTES].data


def _valid_rows(weight: Tensor, group: tuple[int, int], name: str) -> int:
    """How many rows there are. Raises CompressionBug where any group of neighbours has more than it may."""
    zeros, neighbours = group
    for part in torch.split(weight, max(1, CHUNK // weight.shape[1])):
        filled = (part != 0).reshape(-1, neighbours).sum(dim=1)
        if int(filled.max()) > neighbours - zeros:
            raise CompressionBug(f"{name} was written with a row that breaks the pattern {zeros}:{neighbours}")
    return len(weight)
