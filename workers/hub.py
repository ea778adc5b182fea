"""What the Hub says of a model: the commit that its id stands for and its files. Errors in plain words."""

import difflib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

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

from squeeze.errors import HubUnavailable, ModelGated, ModelMalformed, ModelNotFound
from squeeze.specs import HUB_ID

TIMEOUT_SECONDS = 30.0
_DIGEST = re.compile(r"[0-9A-Za-z]{8,128}")
_PAUSES_SECONDS = (0.5, 2.0)  # a short outage should not cost the job an attempt

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RepoFile:
    """digest: SHA-256 (64 hexadecimal digits) of a large file, git's blob id (40) of a small one."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Repo:
    """A model on the Hub at one commit."""

    id: str
    commit: str
    license: str | None
    files: tuple[RepoFile, ...]

    def url(self, name: str) -> str:
        return hf_hub_url(self.id, name, revision=self.commit)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Repo | None":
        """What `save` wrote; None where nothing whole is there."""
        try:
            held = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return cls(held["id"], held["commit"], held["license"], tuple(RepoFile(**file) for file in held["files"]))


def resolve(model: str, commit: str | None = None) -> Repo:
    """The files of `org/name[@revision]`. commit: the one that an earlier attempt resolved it to, which then holds."""
    match = HUB_ID.match(model)
    if match is None:
        raise ModelNotFound(f"{model!r} is not a Hub id; write org/name or org/name@revision", param="model")
    repo_id, revision = match["repo"], match["revision"]
    api = HfApi()
    with plain_words(repo_id, revision):
        info = _patiently(
            lambda: api.model_info(repo_id, revision=commit or revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        )
    if not info.sha:
        raise HubUnavailable(f"{constants.ENDPOINT} names no commit for {repo_id}; is it a Hub?")
    card: Any = info.card_data
    licensed = card.get("license") if card else None
    files = tuple(
        _described(repo_id, info.sha, sibling)
        for sibling in info.siblings or []
        if Path(sibling.rfilename).name == sibling.rfilename  # a model's own files lie at the top
    )
    return Repo(repo_id, info.sha, licensed if isinstance(licensed, str) else None, files)


@contextmanager
def plain_words(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what the Hub's client raises into errors that say what to do next."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        has = "the token in the worker's HF_TOKEN has no access yet" if get_token() else "the worker has no HF_TOKEN"
        raise ModelGated(
            f"{repo_id} is gated and {has}. Accept its terms at {endpoint}/{repo_id}, then start the worker with "
            "HF_TOKEN set to a token of that account and retry the job.",
            param="model",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{repo_id} has no revision {revision!r}.{_nearest_revision(repo_id, revision)}", param="model"
        ) from error
    except EntryNotFoundError as error:
        raise ModelMalformed(f"{repo_id} no longer has a file that it listed; submit the job again") from error
    except (RepositoryNotFoundError, DisabledRepoError, HFValidationError) as error:
        has = "with the worker's HF_TOKEN" if get_token() else "and the worker has no HF_TOKEN (a private one needs it)"
        raise ModelNotFound(
            f"there is no model {repo_id} at {endpoint} that can be seen {has}. Check the spelling (org/name).",
            param="model",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ModelGated(
                f"{endpoint} refuses access to {repo_id} ({status}). Check that the worker's HF_TOKEN is valid and may "
                "read it.",
                param="model",
            ) from error
        raise HubUnavailable(f"{endpoint} answered {status} for {repo_id}. The job is tried again.") from error
    except httpx2.HTTPError as error:
        raise HubUnavailable(
            f"{endpoint} can't be reached ({type(error).__name__}). Check the worker's network and HF_ENDPOINT."
        ) from error
    except json.JSONDecodeError as error:
        raise HubUnavailable(f"{endpoint} does not answer like a Hub. Check the worker's HF_ENDPOINT.") from error


def _patiently(ask: Callable[[], Answer]) -> Answer:
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


def _described(repo_id: str, commit: str, sibling: RepoSibling) -> RepoFile:
    name, size_bytes = sibling.rfilename, sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if size_bytes is None or not digest:  # a mirror whose listing tells names alone
        with plain_words(repo_id, commit):
            held = _patiently(
                lambda: get_hf_file_metadata(hf_hub_url(repo_id, name, revision=commit), timeout=TIMEOUT_SECONDS)
            )
        size_bytes, digest = held.size, held.etag
    if size_bytes is None or not _DIGEST.fullmatch(digest or ""):  # the digest becomes a file's name
        raise HubUnavailable(
            f"{constants.ENDPOINT} gives no size and digest for {repo_id}/{name}. Check the worker's HF_ENDPOINT."
        )
    return RepoFile(name, size_bytes, digest or "")


def _nearest_revision(repo_id: str, revision: str | None) -> str:
    try:
        refs = HfApi().list_repo_refs(repo_id)
    except (httpx2.HTTPError, ValueError):
        return " Check its branches and tags."
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(revision or "", names, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" It has {', '.join(names[:8])}." if names else ""
