"""What the Hub says of a model or dataset: the commit that its id stands for and its files. Errors in plain words."""

import difflib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from squeeze.errors import DataUnusable, HubUnavailable, ModelGated, ModelMalformed, ModelNotFound, SqueezeError
from squeeze.names import HUB_ID

TIMEOUT_SECONDS = 30.0
_DIGEST = re.compile(r"[0-9A-Za-z]{8,128}")
_PAUSES_SECONDS = (0.5, 2.0)  # a short outage should not cost the job an attempt

Answer = TypeVar("Answer")
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class RepoFile:
    """digest: SHA-256 (64 hexadecimal digits) of a large file, git's blob id (40) of a small one.

    beginning_of: the name on the Hub where only that file's first `size_bytes` are meant; its digest is then none.
    """

    name: str
    size_bytes: int
    digest: str
    beginning_of: str | None = None


@dataclass(frozen=True)
class Repo:
    """A model on the Hub at one commit, or what a job needs of a dataset."""

    id: str
    commit: str
    license: str | None
    files: tuple[RepoFile, ...]
    kind: Kind = "model"

    def url(self, name: str) -> str:
        return hf_hub_url(self.id, name, repo_type=self.kind, revision=self.commit)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Repo | None":
        """What `save` wrote; None where nothing whole is there."""
        try:
            held = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return cls(**{**held, "files": tuple(RepoFile(**file) for file in held["files"])})


def resolve(model: str, commit: str | None = None) -> Repo:
    """The files of `org/name[@revision]`. commit: the one that an earlier attempt resolved it to, which then holds."""
    match = HUB_ID.match(model)
    if match is None:
        raise ModelNotFound(f"{model!r} is not a Hub id; write org/name or org/name@revision", param="model")
    repo_id, revision = match["repo"], match["revision"]
    api = HfApi()
    with plain_words(repo_id, revision):
        info = patiently(
            lambda: api.model_info(repo_id, revision=commit or revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        )
    if not info.sha:
        raise HubUnavailable(f"{constants.ENDPOINT} names no commit for {repo_id}; is it a Hub?")
    card: Any = info.card_data
    licensed = card.get("license") if card else None
    files = tuple(
        described(repo_id, info.sha, sibling)
        for sibling in info.siblings or []
        if Path(sibling.rfilename).name == sibling.rfilename  # a model's own files lie at the top
    )
    return Repo(repo_id, info.sha, licensed if isinstance(licensed, str) else None, files)


@contextmanager
def plain_words(repo_id: str, revision: str | None, kind: Kind = "model") -> Iterator[None]:
    """Turns what the Hub's client raises into errors that say what to do next.

    A model's name their field, `model`; a dataset's are DataUnusable without one: who asked knows which it is.
    """
    endpoint = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        has = "the token in the worker's HF_TOKEN has no access yet" if get_token() else "the worker has no HF_TOKEN"
        where = f"{endpoint}/{repo_id}" if kind == "model" else f"{endpoint}/datasets/{repo_id}"
        raise _of_kind(
            kind,
            ModelGated,
            f"{repo_id} is gated and {has}. Accept its terms at {where}, then start the worker with HF_TOKEN set to a "
            "token of that account and retry the job.",
        ) from error
    except RevisionNotFoundError as error:
        near = _nearest_revision(repo_id, revision, kind)
        raise _of_kind(kind, ModelNotFound, f"{repo_id} has no revision {revision!r}.{near}") from error
    except EntryNotFoundError as error:
        raise broken(kind, f"{repo_id} no longer has a file that it listed; submit the job again") from error
    except (RepositoryNotFoundError, DisabledRepoError, HFValidationError) as error:
        has = "with the worker's HF_TOKEN" if get_token() else "and the worker has no HF_TOKEN (a private one needs it)"
        raise _of_kind(
            kind,
            ModelNotFound,
            f"there is no {kind} {repo_id} at {endpoint} that can be seen {has}. Check the spelling (org/name).",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise _of_kind(
                kind,
                ModelGated,
                f"{endpoint} refuses access to {repo_id} ({status}). Check that the worker's HF_TOKEN is valid and may "
                "read it.",
            ) from error
        raise HubUnavailable(f"{endpoint} answered {status} for {repo_id}. The job is tried again.") from error
    except httpx2.HTTPError as error:
        raise HubUnavailable(
            f"{endpoint} can't be reached ({type(error).__name__}). Check the worker's network and HF_ENDPOINT."
        ) from error
    except json.JSONDecodeError as error:
        raise HubUnavailable(f"{endpoint} does not answer like a Hub. Check the worker's HF_ENDPOINT.") from error


def broken(kind: Kind, message: str) -> SqueezeError:
    """The error of a repository whose files are not what they should be."""
    return ModelMalformed(message) if kind == "model" else DataUnusable(message)


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What the Hub answers, asked again after a short outage."""
    for pause in _PAUSES_SECONDS:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code != 429:
                raise
        except httpx2.TransportError:
            pass
        time.sleep(pause)
    return ask()


def described(repo_id: str, commit: str, sibling: RepoSibling, kind: Kind = "model") -> RepoFile:
    """A file of a listing with size and digest; asked for where a mirror's listing tells names alone."""
    name, size_bytes = sibling.rfilename, sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if size_bytes is None or not digest:
        url = hf_hub_url(repo_id, name, repo_type=kind, revision=commit)
        with plain_words(repo_id, commit, kind):
            held = patiently(lambda: get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS))
        size_bytes, digest = held.size, held.etag
    if size_bytes is None or not _DIGEST.fullmatch(digest or ""):  # the digest becomes a file's name
        raise HubUnavailable(
            f"{constants.ENDPOINT} gives no size and digest for {repo_id}/{name}. Check the worker's HF_ENDPOINT."
        )
    return RepoFile(name, size_bytes, digest or "")


def _of_kind(kind: Kind, of_model: type[SqueezeError], message: str) -> SqueezeError:
    return of_model(message, param="model") if kind == "model" else DataUnusable(message)


def _nearest_revision(repo_id: str, revision: str | None, kind: Kind) -> str:
    try:
        refs = HfApi().list_repo_refs(repo_id, repo_type=kind)
    except (httpx2.HTTPError, ValueError):
        return " Check its branches and tags."
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(revision or "", names, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" It has {', '.join(names[:8])}." if names else ""
