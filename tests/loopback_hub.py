"""A small Hub in memory, on the loopback address, that speaks what the installed huggingface_hub client sends.

It keeps each commit with its whole tree, so that old revisions, tags and two pushers at once can be tested without a
network, and it fails on demand. It knows models, their branches and pull requests: no datasets or Xet. The fixture `hub`
in conftest.py starts one and points the clients of this process at it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png")
LFS_SIZE = 10 * 2**20


class HubError(Exception):
    """An answer other than success; by `code` the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code} | dict(headers or {})


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The id by which the client sees whether a file has changed, and its ETag."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, File]  # all, not only those that the commit changed
    title: str
    message: str


@dataclass
class Repo:
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)  # by sha, oldest first
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)  # beside main; pull requests as refs/pr/N
    elsewhere: dict[str, Commit] = field(default_factory=dict)  # commits that are not main's, by sha
    objects: dict[str, bytes] = field(default_factory=dict)  # what came by LFS, by its sha256

    @property
    def head(self) -> Commit:
        return list(self.commits.values())[-1]

    def at(self, revision: str) -> Commit:
        """The commit that main, another branch, a tag or a full sha names."""
        if revision in self.branches:
            return self.branches[revision]
        sha = self.head.sha if revision == "main" else self.tags.get(revision, revision)
        found = self.commits.get(sha) or self.elsewhere.get(sha)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, files: Mapping[str, File], title: str, message: str = "", branch: str = "main") -> Commit:
        # The count tells apart two commits of the same files, as time does on the Hub.
        count = len(self.commits) + len(self.elsewhere)
        state = [count, title, message, sorted((path, file.oid) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        made = Commit(sha, files, title, message)
        if branch == "main":
            self.commits[sha] = made
        else:
            self.elsewhere[sha] = self.branches[branch] = made
        return made


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path contains `part`."""

    method: str = ""
    part: str = ""
    times: int = 1
    kind: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = 0.0
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class LoopbackHub:
    """The Hub: a context manager, or `start()` and `close()`. Started again, it is where it was, with all it held."""

    user = "me"
    token = "token-of-me"
    stranger_token = "token-of-a-stranger"  # valid, but neither sees nor writes what belongs to `user`

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path) of all that came, also of those that went wrong
        self.faults: list[Fault] = []
        self.waits: list[float] = []  # the seconds that a client wanted to sleep; the fixture fills it
        self.lock = threading.RLock()
        self._port = 0

    def start(self) -> LoopbackHub:
        self._server = Server(self, self._port)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def close(self) -> None:
        """Cuts all connections and waits for all threads; from then on, connecting is refused."""
        self.heal()
        self._server.shutdown()
        self._thread.join()
        self._server.cut_connections()
        self._server.server_close()

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    # What a test does without a client.

    def push(self, repo_id: str, files: Mapping[str, bytes] | None = None, delete: Iterable[str] = ()) -> Commit:
        """Commits as another pusher would; makes the repository, public, where there is none."""
        with self.lock:
            repo = self.repos.get(repo_id) or self._make(repo_id, private=False)
            new = {path: File(data, is_lfs(path, len(data))) for path, data in (files or {}).items()}
            kept = {path: file for path, file in repo.head.files.items() if path not in set(delete)}
            return repo.commit(kept | new, "Pushed by a test")

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.repos[repo_id].at(revision).files[path].data

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in list(self.requests))

    # What goes wrong.

    def fail(self, method: str, part: str, *, status: int, times: int = 1, headers: Mapping[str, str] = {}) -> None:
        """Answers with this status and does nothing."""
        self.faults.append(Fault(method, part, times, "fail", status, headers))

    def cut(self, method: str, part: str, *, times: int = 1, how: str = "middle") -> None:
        """Closes the connection in the middle of the upload, or of the download where nothing is uploaded.

        `how="reset"` does it as a broken line does; `how="answer"` does all that was asked and loses the answer.
        """
        self.faults.append(Fault(method, part, times, how))

    def delay(self, method: str, part: str, *, seconds: float, times: int = 1) -> None:
        """Waits before doing what was asked, at most until the Hub is closed."""
        self.faults.append(Fault(method, part, times, seconds=seconds))

    def hold(self, method: str, part: str) -> Fault:
        """Stops the next such request until `release.set()`; `reached.wait(10)` waits for it to come."""
        self.faults.append(Fault(method, part, seconds=None))
        return self.faults[-1]

    def heal(self) -> None:
        """Ends all that goes wrong; what is held goes on."""
        for fault in self.faults:
            fault.times = 0
            fault.release.set()

    def arrive(self, method: str, path: str) -> Fault:
        """Notes a request and takes the fault that is meant for it."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return Fault()

    # What a client may ask for.

    def answer(self, ask: Handler) -> Any:
        """Does it and returns what is sent as JSON, or a status, headers and bytes."""
        match [ask.command, *map(unquote, ask.path[1:].split("/"))]:
            case ["GET", "api", "whoami-v2"]:
                return {"type": "user", "name": self._user(ask), "orgs": []}
            case ["POST", "api", "repos", "create"]:
                return self._create(ask)
            case ["POST", "api", "validate-yaml"]:
                warning = [{"message": "empty or missing yaml metadata in repo card"}]
                return {"errors": [], "warnings": [] if ask.json()["content"].startswith("---\n") else warning}
            case ["GET", "api", "models", owner, name]:
                return self._info(self._repo(ask, owner, name), "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                return self._info(self._repo(ask, owner, name), revision)
            case ["GET", "api", "models", owner, name, "tree", revision, *folder]:
                return self._tree(ask, self._repo(ask, owner, name).at(revision), "/".join(folder))
            case ["HEAD" | "GET", owner, name, "resolve", revision, *path]:
                return self._file(ask, self._repo(ask, owner, name).at(revision), "/".join(path))
            case ["GET", "api", "models", owner, name, "refs"]:
                return self._refs(self._repo(ask, owner, name))
            case ["GET", "api", "models", owner, name, "commits", revision]:
                return self._history(self._repo(ask, owner, name), revision)
            case ["POST", "api", "models", owner, name, "tag", revision]:
                repo, tag = self._repo(ask, owner, name, write=True), ask.json()["tag"]
                if tag in repo.tags:
                    raise HubError(409, f"Tag reference exists already: {tag}")
                repo.tags[tag] = repo.at(revision).sha
                return {}
            case ["DELETE", "api", "models", owner, name, "tag", tag]:
                if self._repo(ask, owner, name, write=True).tags.pop(tag, None) is None:
                    raise HubError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
                return {}
            case ["POST", "api", "models", owner, name, "branch", branch]:
                repo = self._repo(ask, owner, name, write=True)
                if branch == "main" or branch in repo.branches:
                    raise HubError(409, f"Reference already exists: {branch}")
                repo.branches[branch] = repo.head
                return {}
            case ["POST", "api", "models", owner, name, "preupload" | "commit" as what, revision]:
                opens = "create_pr=1" in ask.query
                repo = self._repo(ask, owner, name, write=not opens)
                if revision != "main" and revision not in repo.branches:
                    raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                return (
                    self._preupload(ask, repo, revision)
                    if what == "preupload"
                    else self._commit(ask, repo, revision, opens)
                )
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(ask, self._repo(ask, owner, name.removesuffix(".git"), write=True))
            case ["PUT", "lfs", owner, name, oid]:
                # Nobody asks for a token: on the Hub this is the address of a store, signed for one upload.
                if hashlib.sha256(ask.body).hexdigest() != oid:
                    raise HubError(400, "The content does not match its sha256")
                self.repos[f"{owner}/{name}"].objects[oid] = ask.body
                return {}
            case ["POST", "lfs", owner, name, oid, "verify"]:
                if oid not in self._repo(ask, owner, name, write=True).objects:
                    raise HubError(404, "Not uploaded")
                return {}
        raise HubError(404, f"Unknown to the loopback Hub: {ask.command} {ask.path}")

    def _user(self, ask: Handler, required: bool = True) -> str | None:
        users = {None: None, f"Bearer {self.token}": self.user, f"Bearer {self.stranger_token}": "stranger"}
        header = ask.headers.get("Authorization")
        if header not in users:
            raise HubError(401, "Invalid credentials in Authorization header")
        if required and header is None:
            raise HubError(401, "Invalid username or password.")
        return users[header]

    def _repo(self, ask: Handler, owner: str, name: str, write: bool = False) -> Repo:
        user, repo = self._user(ask, required=False), self.repos.get(f"{owner}/{name}")
        if user is None and (write or repo is None or repo.private):
            # The client takes any 401 for this code where the address is one of https; here it has to be told.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and user != owner):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403, f"You don't have the rights to write to {repo.repo_id}")
        return repo

    def _make(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit({".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")
        return repo

    def _create(self, ask: Handler) -> Any:
        user, wanted = self._user(ask), ask.json()
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        if not repo_id.startswith(f"{user}/"):
            raise HubError(403, f"You don't have the rights to create {repo_id}")
        answer = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repos:  # with exist_ok, the client reads the address from the refusal
            return 409, {}, json.dumps(answer | {"error": "You already created this model repo"}).encode()
        self._make(repo_id, wanted.get("visibility") == "private")
        return answer

    def _info(self, repo: Repo, revision: str) -> Any:
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {"id": repo.repo_id, "sha": commit.sha, "private": repo.private, "tags": [], "siblings": siblings}

    def _refs(self, repo: Repo) -> Any:
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}
        return {"branches": [main], "tags": tags, "converts": []}

    def _history(self, repo: Repo, revision: str) -> Any:
        commits = list(repo.commits.values())
        known = {"authors": [{"user": self.user}], "date": "2020-01-01T00:00:00.000Z"}
        past = commits[commits.index(repo.at(revision)) :: -1]
        return [{"id": commit.sha, "title": commit.title, "message": commit.message} | known for commit in past]

    def _tree(self, ask: Handler, commit: Commit, folder: str) -> Any:
        start = f"{folder}/" if folder else ""
        files = {path: file for path, file in sorted(commit.files.items()) if path.startswith(start)}
        if not files:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {".", folder}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": ""} for path in sorted(folders)]
        for path, file in files.items():
            entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            lfs = {"oid": file.oid, "size": len(file.data), "pointerSize": 130}
            entries.append(entry | {"lfs": lfs} if file.lfs else entry)
        if "recursive=true" in ask.query:
            return entries
        return [entry for entry in entries if PurePosixPath(entry["path"]).parent == PurePosixPath(folder)]

    def _file(self, ask: Handler, commit: Commit, path: str) -> Any:
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file, data = commit.files[path], commit.files[path].data
        headers |= {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(data))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if first > last:
                raise HubError(416, "Nothing is there", headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, headers, data[first : last + 1]
        return 200, headers, data

    def _preupload(self, ask: Handler, repo: Repo, revision: str) -> Any:
        answers = []
        for wanted in ask.json()["files"]:
            mode = "lfs" if is_lfs(wanted["path"], wanted["size"]) else "regular"
            present = repo.at(revision).files.get(wanted["path"])
            answer = {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": present.oid} if present else {}))
        return {"files": answers}

    def _batch(self, ask: Handler, repo: Repo) -> Any:
        answers = []
        for wanted in ask.json()["objects"]:
            href = f"{self.endpoint}/lfs/{repo.repo_id}/{wanted['oid']}"
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            answers.append(wanted | (actions if wanted["oid"] not in repo.objects else {}))
        return {"objects": answers}

    def _commit(self, ask: Handler, repo: Repo, revision: str, opens: bool) -> Any:
        (_, header), *operations = [(o["key"], o["value"]) for o in map(json.loads, ask.body.splitlines())]
        if not repo.at(revision).sha.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(revision).files)
        for key, value in operations:
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, f"{path} points to a large file that was not uploaded")
                files[path] = File(repo.objects[value["oid"]], lfs=True)
            else:
                start = path.rstrip("/") + "/"
                gone = {p for p in files if (p.startswith(start) if key == "deletedFolder" else p == path)}
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {p: file for p, file in files.items() if p not in gone}
        request = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
        branch = f"refs/pr/{request}" if opens else revision
        sha = repo.commit(files, header["summary"], header["description"], branch).sha
        answer = {"commitUrl": f"{self.endpoint}/{repo.repo_id}/commit/{sha}", "commitOid": sha}
        return answer | ({"pullRequestUrl": f"{self.endpoint}/{repo.repo_id}/discussions/{request}"} if opens else {})


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE)


class Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for them: no thread outlives its test
    request_queue_size = 128

    def __init__(self, hub: LoopbackHub, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """Wakes the threads that wait for the next request of a client that keeps its connection."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # its thread has just closed it
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away at any time
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    server: Server

    def serve(self) -> None:
        hub = self.server.hub
        self.path, _, self.query = self.path.partition("?")
        fault = hub.arrive(self.command, self.path)
        half = fault.kind in ("middle", "reset")
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read((length + 1) // 2 if half else length)
        fault.reached.set()
        fault.release.wait(fault.seconds)
        if half and (self.body or self.command == "HEAD"):
            self.cut(fault)
        try:
            with hub.lock:
                if fault.kind == "fail":
                    raise HubError(fault.status, "Set by a test", headers=fault.headers)
                result = hub.answer(self)
            status, headers, body = result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
        except HubError as error:
            status, headers, body = error.status, error.headers, json.dumps({"error": str(error)}).encode()
        if fault.kind == "answer":
            self.cut(fault)
        self.send_response(status)
        for header in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.cut(fault)

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = serve

    def json(self) -> Any:
        return json.loads(self.body)

    def cut(self, fault: Fault) -> None:
        """Ends this connection, and the method that was called for it, here."""
        self.wfile.flush()
        if fault.kind == "reset":  # closing without lingering sends a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for end in (self.rfile, self.wfile, self.connection):
                end.close()
        else:  # read on, or what is unread would turn the end into a reset
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read(2**16):
                pass
        raise ConnectionAbortedError("Cut by a test")

    def log_message(self, *_: object) -> None:
        pass
