"""A model's files as a plan sees them, wherever they lie: names, sizes, and the first bytes of each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from api.admission import directory_of
from api.service import Service
from jobs import lifecycle, listing
from squeeze.errors import (
    DataUnusable,
    HubUnavailable,
    ModelGated,
    ModelMalformed,
    ModelNotFound,
    SpecInvalid,
)
from squeeze.names import HUB_ID, OWN_ID
from squeeze.objects import Status
from squeeze.specs.job_spec import HubText

HUB_SECONDS = 10.0


@dataclass(frozen=True)
class Files:
    """sizes: bytes of each file at the top of the model. read(name, start, end): those bytes. revision: a commit.

    pulled: the files have to be copied to the worker first.
    """

    sizes: dict[str, int]
    read: Callable[[str, int, int], bytes]
    pulled: bool
    revision: str | None = None


def files_of(service: Service, project: str, model: str, *, adapter: bool = False) -> Files:
    """The files of what a spec calls a model; raises what stands in the way. adapter: whether it may be one."""
    directory = directory_of(model, service.settings.model_roots, adapter=adapter)
    if directory is not None:
        return _of_directory(directory)
    if OWN_ID.match(model):
        return _of_job(service, project, model)
    return _of_hub(service.hub, model)


def refuse_absent_dataset(endpoint: str, name: HubText) -> None:
    """Raises what stands in a dataset's way: it is not there, or can't be seen. Its splits are the worker's to tell."""
    try:
        with _plain_words(endpoint, name.repo, name.revision, "dataset"):
            HfApi(endpoint=endpoint).dataset_info(name.repo, revision=name.revision, timeout=HUB_SECONDS)
    except (ModelNotFound, ModelGated, ModelMalformed) as error:
        raise DataUnusable(error.message) from error


def _of_directory(directory: Path) -> Files:
    def read(name: str, start: int, end: int) -> bytes:
        with (directory / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    sizes = {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}
    return Files(sizes, read, pulled=False)


def _of_job(service: Service, project: str, job_id: str) -> Files:
    with service.database.read() as session:
        job = lifecycle.find(session, project, job_id)
        if job.status is not Status.succeeded:
            raise SpecInvalid(f"{job_id} is {job.status.value}; only a job that succeeded has a result.", param="model")
        records = listing.artifacts(session, project, job_id)
    first = job.spec["formats"][0]  # a job with several formats is continued from its first
    found = {
        record.filename.removeprefix(f"{first}/"): record
        for record in records
        if record.filename.startswith(f"{first}/") and record.filename.count("/") == 1
    }

    def read(name: str, start: int, end: int) -> bytes:
        return b"".join(service.storage.read(found[name].storage_key, start, end))

    return Files({name: record.bytes for name, record in found.items()}, read, pulled=True)


def _of_hub(endpoint: str, model: str) -> Files:
    match = HUB_ID.match(model)
    if match is None:
        raise ModelNotFound(f"{model!r} is no id of the Hub.", param="model")
    repo, revision = match["repo"], match["revision"]
    with _plain_words(endpoint, repo, revision):
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
        commit = info.sha or revision
        siblings: list[Any] = [each for each in info.siblings or [] if "/" not in each.rfilename]
        sizes = {each.rfilename: _size(endpoint, repo, commit, each) for each in siblings}

    def read(name: str, start: int, end: int) -> bytes:
        with _plain_words(endpoint, repo, revision):
            return _get(hf_hub_url(repo, name, revision=commit, endpoint=endpoint), start, end)

    return Files(sizes, read, pulled=True, revision=info.sha)


def _size(endpoint: str, repo: str, commit: str | None, sibling: Any) -> int:
    """A mirror's listing may tell names alone; then only what a plan reads is asked for."""
    name = sibling.rfilename
    if sibling.size is not None:
        return int(sibling.size)
    if not name.endswith((".json", ".safetensors", ".bin")):
        return 0
    url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint)
    return get_hf_file_metadata(url, timeout=HUB_SECONDS, endpoint=endpoint).size or 0


def _get(url: str, start: int, end: int) -> bytes:
    """The bytes [start, end); a server that ignores Range and sends the whole file is cut off."""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
    held = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=HUB_SECONDS) as answer:
        hf_raise_for_status(answer)
        skip = 0 if answer.status_code == 206 else start
        for chunk in answer.iter_bytes():
            held += chunk
            if len(held) >= skip + end - start:
                break
    return bytes(held[skip : skip + end - start])


@contextmanager
def _plain_words(endpoint: str, repo: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """Turns what the Hub's client raises into errors that say what to do next."""
    try:
        yield
    except GatedRepoError as error:
        raise ModelGated(
            f"{repo} is gated. Accept its terms at {endpoint}/{repo} and give the service and its workers HF_TOKEN.",
            param="model",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{repo} has no revision {revision!r}; check its branches.", param="model") from error
    except (RepositoryNotFoundError, DisabledRepoError, HFValidationError) as error:
        raise ModelNotFound(
            f"There is no {kind} {repo} at {endpoint}, or it is private and HF_TOKEN does not open it.", param="model"
        ) from error
    except EntryNotFoundError as error:
        raise ModelMalformed(f"{repo} lists a file that it does not have.", param="model") from error
    except HfHubHTTPError as error:
        raise HubUnavailable(f"{endpoint} answered {error.response.status_code} for {repo}.", param="model") from error
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise HubUnavailable(
            f"{endpoint} can't be reached ({type(error).__name__}). Check the network and HF_ENDPOINT.", param="model"
        ) from error
    except ValueError as error:  # its JSON can't be read
        raise HubUnavailable(f"{endpoint} does not answer like a Hub. Check HF_ENDPOINT.", param="model") from error
