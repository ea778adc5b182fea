"""From what a job names as its model to a directory that holds it; what is unsafe is refused as early as it shows."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squeeze.errors import SqueezeError
from squeeze.names import OWN_ID
from squeeze.objects import Stage
from squeeze.specs.job_spec import JobSpec
from storage import Storage
from workers.channel import Teller
from workers.download import Snapshot
from workers.hub import Repo, resolve
from workers.request import Request, StoredFile
from workers.room import demand
from workers.sources import directory, earlier_job
from workers.weights import (
    ADAPTER_CONFIG,
    CONFIG,
    SMALL_BYTES_MAX,
    Choice,
    adapter_files,
    choose,
    is_adapter,
    refuse_code,
    weight_files,
)

Check = Callable[[Path], object]


@dataclass(frozen=True)
class Wanted:
    """A model that a job names. param: the field that does. files: of the earlier job that it is. revision: that an
    earlier attempt resolved its id to. folder: of the scratch directory. adapter: whether it may be an adapter.
    """

    name: str
    param: str
    folder: str
    files: tuple[StoredFile, ...] = ()
    revision: str | None = None
    adapter: bool = False

    @property
    def own(self) -> bool:
        """Whether it is the job's own, of whose size the result is reckoned."""
        return self.param == "model"


@dataclass(frozen=True)
class Pulled:
    """name: what the report may call the model. revision: the commit of a model from the Hub. digest: of the files of
    an earlier job.
    """

    directory: Path
    name: str
    revision: str | None = None
    license: str | None = None
    digest: str | None = None


def pull(
    request: Request, spec: JobSpec, storage: Storage, check: Check, teller: Teller, wanted: Wanted | None = None
) -> Pulled:
    """A model that a job names, its own by default, on local disk.

    check: is called with the directory as soon as `config.json` is in it, before any weights; raises to refuse it.
    """
    teller.stage(Stage.pulling)
    wanted = wanted or Wanted(spec.model, "model", "source", request.source, request.revision)
    try:
        return _pulled(request, spec, storage, check, teller, wanted)
    except SqueezeError as error:
        error.param = wanted.param if error.param == "model" else error.param
        raise


def _pulled(request: Request, spec: JobSpec, storage: Storage, check: Check, teller: Teller, wanted: Wanted) -> Pulled:
    if wanted.name.startswith("/"):
        path = directory(wanted.name, request.model_roots, adapter=wanted.adapter)
        check(path)
        weights = sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
        _demand(request, spec, wanted, weights, 0)
        return Pulled(path, path.name)
    if OWN_ID.match(wanted.name):
        into = request.scratch_path / wanted.folder
        size_bytes = sum(file.size_bytes for file in wanted.files)
        _demand(request, spec, wanted, size_bytes, 0 if into.exists() else size_bytes)
        path = earlier_job(
            wanted.files,
            into,
            storage,
            check,
            lambda done, total: teller.advance(done, total, "bytes"),
            adapter=wanted.adapter,
        )
        return Pulled(path, wanted.name, digest=_digest(wanted.files))
    return _from_hub(request, spec, check, teller, wanted)


def _digest(files: tuple[StoredFile, ...]) -> str:
    """Of all of them."""
    return hashlib.sha256("".join(sorted(f"{file.filename} {file.sha256}\n" for file in files)).encode()).hexdigest()


def _from_hub(request: Request, spec: JobSpec, check: Check, teller: Teller, wanted: Wanted) -> Pulled:
    # A branch may move between two attempts of a job; what the first one resolved holds for all of them.
    note = request.scratch_path / f"{wanted.folder}.json"
    repo = Repo.load(note)
    if repo is None:
        repo = resolve(wanted.name, wanted.revision)
        repo.save(note)
    if wanted.own:
        teller.revision(repo.commit)
    names = [file.name for file in repo.files]
    sizes = {file.name: file.size_bytes for file in repo.files}
    snapshot = Snapshot(Path(request.cache), repo)
    adapter = wanted.adapter and is_adapter(names)
    choice = Choice((ADAPTER_CONFIG,), ()) if adapter else choose(names)
    snapshot.fetch(choice.first, _ignore)
    if not adapter:
        refuse_code(snapshot.path / CONFIG)
    check(snapshot.path)
    weights = adapter_files(names) if adapter else weight_files(names, snapshot.path)
    small = [name for name in choice.small if sizes[name] <= SMALL_BYTES_MAX]
    _demand(request, spec, wanted, snapshot.size_bytes(weights), snapshot.missing_bytes([*weights, *small]))
    files = [*small, *weights]
    meter = _Meter(teller, snapshot.size_bytes(files))
    snapshot.fetch(files, meter)
    return Pulled(snapshot.path, repo.id, repo.commit, repo.license)


class _Meter:
    """Adds up the bytes that several downloads bring."""

    def __init__(self, teller: Teller, total: int) -> None:
        self._teller = teller
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, size_bytes: int) -> None:
        with self._lock:
            self._done += size_bytes
            self._teller.advance(self._done, self._total, "bytes")


def _ignore(size_bytes: int) -> None:
    """A few kilobytes of configuration are not worth telling of."""


def _demand(request: Request, spec: JobSpec, wanted: Wanted, source_bytes: int, missing_bytes: int) -> None:
    demand(
        spec,
        source_bytes=source_bytes if wanted.own else 0,
        missing_bytes=missing_bytes,
        cache=Path(request.cache),
        scratch=request.scratch_path,
        storage=request.storage_directory,
    )
