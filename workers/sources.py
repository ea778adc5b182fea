"""Models and texts that need no Hub: earlier jobs, uploaded files, directories that the operator allows."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from squeeze.errors import ModelDirectoryForbidden, ModelMalformed, ModelNotFound
from storage import Storage
from workers.request import StoredFile
from workers.weights import ADAPTER_CONFIG, CONFIG, adapter_files, choose, is_adapter, refuse_code, weight_files

Advance = Callable[[int, int], None]


def directory(name: str, roots: tuple[str, ...], *, adapter: bool = False) -> Path:
    """A local model directory, used in place. It and all its files must lie under an allowed root, links resolved.

    adapter: whether it may be an adapter's.
    """
    path = Path(name).resolve()
    allowed = [Path(root).resolve() for root in roots]
    if not any(path.is_relative_to(root) for root in allowed):
        raise ModelDirectoryForbidden(
            f"{name} is not under a directory that this service may read. Ask its operator to add one to "
            "SQUEEZE_MODEL_ROOTS, or name a model on the Hub.",
            param="model",
        )
    if not path.is_dir():
        raise ModelNotFound(f"the worker has no directory {name}", param="model")
    for file in path.iterdir():
        if not any(file.resolve().is_relative_to(root) for root in allowed):
            raise ModelDirectoryForbidden(
                f"{name}/{file.name} is a link that leads out of the directories that this service may read",
                param="model",
            )
    names = [file.name for file in path.iterdir() if file.is_file()]
    if adapter and is_adapter(names):
        adapter_files(names)
        return path
    choose(names)
    refuse_code(path / CONFIG)
    weight_files(names, path)
    return path


def earlier_job(
    files: tuple[StoredFile, ...],
    into: Path,
    storage: Storage,
    check: Callable[[Path], object],
    advance: Advance,
    *,
    adapter: bool = False,
) -> Path:
    """The model that an earlier job wrote, fetched and verified. files: of one of its formats.

    check: looks at `config.json` before the weights are fetched. adapter: whether it may be an adapter, whose
    settings are looked at then.
    """
    into.mkdir(parents=True, exist_ok=True)
    named = {_inside(file.filename): file for file in files}
    first = ADAPTER_CONFIG if adapter and is_adapter(named) else CONFIG
    if first not in named:
        raise ModelMalformed("the earlier job's result has no config.json", param="model")
    total, done = sum(file.size_bytes for file in files), 0
    for name in sorted(named, key=lambda name: (name != first, name)):
        file, target = named[name], into / name
        # A file appears only whole and checked, so one that is there came with an earlier attempt.
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(file.key, target, file.sha256)
        if name == first:
            check(into)
        done += file.size_bytes
        advance(done, total)
    return into


def uploaded(file: StoredFile, into: Path, storage: Storage) -> Path:
    """An uploaded text. Its own name stays out of the path; what it holds is told from its bytes."""
    into.mkdir(parents=True, exist_ok=True)
    target = into / file.sha256
    if not target.is_file():
        storage.fetch(file.key, target, file.sha256)
    return target


def _inside(filename: str) -> str:
    """`format/rest` -> `rest`."""
    parts = PurePosixPath(filename).parts[1:]
    if not parts or ".." in parts:
        raise ModelMalformed(f"the earlier job has a file named {filename!r}", param="model")
    return str(PurePosixPath(*parts))
