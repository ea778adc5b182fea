"""A Hub on this machine that serves local directories: `python scripts/hub.py --repo org/name=DIR --port 0`.

It speaks as much of the Hub's protocol as `huggingface_hub` and transformers need to pull a model, or the files of a
dataset (`--dataset org/name=DIR`), so that the way from an id to a directory can be walked without a network: start
it, set `HF_ENDPOINT` to the URL that it prints.
Standard library only.
"""

import argparse
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

_CHUNK_BYTES = 1 << 18
_LARGE = {".safetensors", ".bin", ".pt", ".h5", ".gguf", ".parquet"}
_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")
_LICENSE = re.compile(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", re.DOTALL | re.MULTILINE)
_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)(?:/(?P<what>revision|tree|refs)(?:/(?P<rest>.*))?)?$"
)
_RESOLVE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it. etag: SHA-256 of a large file, git's blob id of a small one."""

    path: Path
    size_bytes: int
    blob_id: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id


@dataclass
class HubRepo:
    """A model or dataset: its commits, each a directory of files, and the branches and tags that name them."""

    id: str
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # of an account that has accepted the terms; None: anybody may read

    def commit(self, directory: Path, revision: str = "main") -> str:
        """A directory as it is now becomes what a branch points to; the commit's id."""
        files = {path.relative_to(directory).as_posix(): _describe(path) for path in _files(directory)}
        listing = "".join(f"{name} {file.etag}\n" for name, file in files.items())
        commit = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.refs[revision] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


class Hub:
    """The server; `with Hub() as hub:` serves until the block ends. repos: a dataset's name begins with `datasets/`."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, HubRepo] = {}
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, directory: Path, revision: str = "main") -> HubRepo:
        repo = self.repos.setdefault(name, HubRepo(name))
        repo.commit(directory, revision)
        return repo

    def add_dataset(self, name: str, directory: Path, revision: str = "main") -> HubRepo:
        repo = self.repos.setdefault(f"datasets/{name}", HubRepo(name))
        repo.commit(directory, revision)
        return repo

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self) -> None:
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def refuses(self, method: str, path: str) -> int | None:  # noqa: ARG002
        """A status to answer instead of the truth; a Hub that is well has none."""
        return None

    def tells_sizes(self) -> bool:
        """Whether a model's listing gives sizes and digests to those who ask; some mirrors' gives names alone."""
        return True

    def ranged(self, header: str) -> str:
        """The Range header that is to be obeyed."""
        return header

    def transmit(self, handler: BaseHTTPRequestHandler, file: HubFile, start: int, end: int) -> None:
        """The body: bytes [start, end) of a file."""
        with file.path.open("rb") as source:
            source.seek(start)
            while start < end and (chunk := source.read(min(_CHUNK_BYTES, end - start))):
                handler.wfile.write(chunk)
                start += len(chunk)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients come and go
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "hub"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_HEAD(self) -> None:
        self._route(body=False)

    def do_GET(self) -> None:
        self._route(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the one who asks logs."""

    def _route(self, *, body: bool) -> None:
        parts = urlsplit(self.path)
        status = self.hub.refuses(self.command, unquote(parts.path))
        if status is not None:
            self._refuse(status, "", "the Hub is told to refuse")
        elif match := _API.match(parts.path):  # still quoted: a revision may have slashes of its own
            self._api(
                match["repo"] if match["kind"] == "models" else f"datasets/{match['repo']}",
                match["what"],
                match["rest"] or "",
                "blobs" in parse_qs(parts.query) and self.hub.tells_sizes(),
                body,
            )
        elif match := _RESOLVE.match(parts.path):
            self._resolve(match["repo"], unquote(match["revision"]), unquote(match["path"]), body)
        else:
            self._refuse(404, "", "no such route")

    def _api(self, name: str, what: str | None, rest: str, blobs: bool, body: bool) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        if what == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit} for ref, commit in repo.refs.items()
            ]
            self._json({"branches": branches, "converts": [], "tags": []}, body)
            return
        revision, _, folder = rest.partition("/")
        commit = repo.resolve(unquote(revision) or "main")
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "tree":
            self._json(_tree(repo.commits[commit], unquote(folder)), body)
        else:
            self._json(_info(repo, commit, blobs), body)

    def _resolve(self, name: str, revision: str, path: str, body: bool) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        if repo.token is not None and self.headers.get("Authorization") != f"Bearer {repo.token}":
            status = 403 if "Authorization" in self.headers else 401
            self._refuse(status, "GatedRepo", f"Access to {name} is restricted")
            return
        commit = repo.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        file = repo.commits[commit].get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        self._file(file, commit, body)

    def _file(self, file: HubFile, commit: str, body: bool) -> None:
        start, end, status = 0, file.size_bytes, 200
        asked = _RANGE.match(self.hub.ranged(self.headers.get("Range", "")))
        if asked:
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else file.size_bytes, file.size_bytes)
            if start >= end:
                self._refuse(416, "", "no such range", {"Content-Range": f"bytes */{file.size_bytes}"})
                return
            status = 206
        self.send_response(status)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("Accept-Ranges", "bytes")
        if file.sha256:
            self.send_header("X-Linked-Etag", f'"{file.sha256}"')
            self.send_header("X-Linked-Size", str(file.size_bytes))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size_bytes}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            try:
                self.hub.transmit(self, file, start, end)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has gone

    def _json(self, value: object, body: bool) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        content = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _describe(path: Path) -> HubFile:
    size = path.stat().st_size
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    whole = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            git.update(chunk)
            whole.update(chunk)
    return HubFile(path, size, git.hexdigest(), whole.hexdigest() if path.suffix in _LARGE else None)


def _info(repo: HubRepo, commit: str, blobs: bool) -> dict[str, object]:
    files = repo.commits[commit]
    siblings: list[dict[str, object]] = []
    for name, file in files.items():
        sibling: dict[str, object] = {"rfilename": name}
        if blobs:
            sibling |= {"size": file.size_bytes, "blobId": file.blob_id}
            if file.sha256:
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": 134}
        siblings.append(sibling)
    licensed = _LICENSE.search(files["README.md"].path.read_text()) if "README.md" in files else None
    return {
        "id": repo.id,
        "modelId": repo.id,
        "sha": commit,
        "private": False,
        "gated": "manual" if repo.token else False,
        "tags": [],
        "downloads": 0,
        "siblings": siblings,
        "cardData": {"license": licensed[1]} if licensed else {},
    }


def _tree(files: dict[str, HubFile], folder: str) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for name, file in files.items():
        if name.startswith(f"{folder}/" if folder else ""):
            entry: dict[str, object] = {
                "type": "file",
                "path": name,
                "size": file.size_bytes,
                "oid": file.blob_id,
            }
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": 134}
            entries.append(entry)
    return entries


def serve(description: str | None, hub_class: type[Hub]) -> None:
    """The command line: serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=DIRECTORY", help="a model")
    parser.add_argument("--dataset", action="append", default=[], metavar="ORG/NAME=DIRECTORY")
    parser.add_argument("--port", type=int, default=0, help="0 takes any that is free")
    options = parser.parse_args()
    hub = hub_class(options.port)
    for add, pair in [(hub.add, pair) for pair in options.repo] + [(hub.add_dataset, pair) for pair in options.dataset]:
        name, _, directory = pair.partition("=")
        if not Path(directory).is_dir():
            sys.exit(f"there is no directory {directory}")
        add(name, Path(directory))
    hub.start()
    print(hub.url, flush=True)
    try:
        hub.wait()
    except KeyboardInterrupt:
        return  # its threads end with the process


if __name__ == "__main__":
    serve(__doc__, Hub)
