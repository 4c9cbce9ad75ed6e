"""A stand-in for the Hugging Face Hub: one loopback port, enough of the protocol for the real client.

`huggingface_hub` is pointed at it by `HF_ENDPOINT` (read when the module is imported, so the client lives in a
process of its own, see `client_env`). What is spoken: who am I, create a repository or a branch, model info, tree,
YAML check, pre-upload, the Git LFS batch call with its upload, commit, and download (HEAD and GET of `resolve`). The
Xet transfer is a binary protocol of its own; the client falls back to Git LFS when `HF_HUB_DISABLE_XET=1`, which is
the path spoken here.

Written from the requests that huggingface_hub 2.4 sends (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`), since no package found on PyPI serves uploads: the one with the right name ships a client for a
server that it does not contain, and the mirrors are read-only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "a" * 34
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".pth", ".h5")


@dataclass
class Commit:
    """One commit: its id, its summary line and the whole tree, path to contents."""

    oid: str
    summary: str
    tree: dict[str, bytes]


@dataclass
class Repository:
    """A model repository: its visibility and its branches, each a list of commits, oldest first."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [_commit("initial commit", {})]})

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch name or a commit id stands for."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        """The files at the head of main."""
        return self.branches["main"][-1].tree

    @property
    def summaries(self) -> list[str]:
        """Summary lines of main's commits, oldest first."""
        return [commit.summary for commit in self.branches["main"]]


class HubStandIn:
    """The server. Use it as a context manager; `repos` maps `namespace/name` to `Repository`.

    Args:
        dies_at: Called with the method and the path of each request; where it returns True, the connection is cut
            without an answer and so is every later one, as when the network goes away.
    """

    def __init__(self, dies_at: Callable[[str, str], bool] = lambda method, path: False):
        self.repos: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.dies_at, self.dead, self.lock = dies_at, False, threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def client_env(self, home: str, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a process whose Hub is this one; `home` is a fresh cache folder."""
        env = {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return env | ({"HF_TOKEN": token} if token else {})


def _commit(summary: str, tree: dict[str, bytes]) -> Commit:
    text = summary + "".join(f"{path}\0{_sha256(data)}" for path, data in sorted(tree.items()))
    return Commit(hashlib.sha1(text.encode()).hexdigest(), summary, tree)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _oid(path: str, data: bytes) -> str:
    return _sha256(data) if _is_lfs(path) else _git_oid(data)


def _tree_entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return entry


class _Refused(Exception):
    """An answer other than 200: status, message, the Hub's error code, and fields of the body."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: object):
        self.status, self.message, self.code, self.body = status, message, code, body


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet: the client's own errors are what a test reads."""

    def _serve(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            self.hub.dead = self.hub.dead or self.hub.dies_at(self.command, self.path)
        if self.hub.dead:
            self.close_connection = True
            return
        try:
            body = self._read_body()
            with self.hub.lock:
                self._route(body)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(refused.status, json.dumps({"error": refused.message, **refused.body}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, body: bytes) -> None:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in method.split("|"):
                return action(self, body, **match.groupdict())
        raise _Refused(404, f"The stand-in does not speak {self.command} {self.path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _need_token(self) -> None:
        if not self._has_token():
            raise _Refused(401, "Invalid username or password.")

    def _repo(self, repo: str) -> Repository:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self._has_token()):
            raise _Refused(404 if self._has_token() else 401, "Repository not found", "RepoNotFound")
        return found

    def _commit_at(self, repo: str, revision: str) -> Commit:
        commit = self._repo(repo).resolve(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def who_am_i(self, body: bytes) -> None:
        self._need_token()
        self._json(
            {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        )

    def create_repo(self, body: bytes) -> None:
        self._need_token()
        asked = json.loads(body)
        namespace = asked.get("organization") or USER
        if namespace != USER:
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo = f"{namespace}/{asked['name']}"
        if repo in self.hub.repos:
            raise _Refused(409, "You already created this model repo", url=f"{self.hub.endpoint}/{repo}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[repo] = Repository(private)
        self._json({"url": f"{self.hub.endpoint}/{repo}"})

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        self._need_token()
        self._repo(repo).branches[branch] = list(self._repo(repo).branches["main"])
        self._json({})

    def model_info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        commit = self._commit_at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in commit.tree]
        info = {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "tags": [], "downloads": 0, "likes": 0}
        self._json(info | {"private": self._repo(repo).private, "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        prefix = f"{folder.strip('/')}/" if folder else ""
        tree = self._commit_at(repo, revision).tree
        self._json([_tree_entry(path, data) for path, data in tree.items() if path.startswith(prefix)])

    def validate_yaml(self, body: bytes) -> None:
        asked = json.loads(body)
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            raise _Refused(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        base = metadata.get("base_model", "owner/name")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from the Hub.'
            raise _Refused(400, message, errors=[{"message": message}])
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._need_token()
        tree = self._commit_at(repo, revision).tree
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            answer = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular", "shouldIgnore": False}
            files.append(answer | ({"oid": _oid(path, tree[path])} if path in tree else {}))
        self._json({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._need_token()
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.hub.lfs else asked | {"actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if _sha256(body) != oid:
            raise _Refused(400, "The uploaded bytes do not have the announced sha256")
        self.hub.lfs[oid] = body
        self._json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self._need_token()
        tree = dict(self._commit_at(repo, revision).tree)
        summary = ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                raise _Refused(400, f"The stand-in does not speak the commit operation {key}")
        commits = self._repo(repo).branches[revision]
        commits.append(_commit(summary + str(len(commits)), tree))
        commits[-1].summary = summary
        url = f"{self.hub.endpoint}/{repo}/commit/{commits[-1].oid}"
        self._json({"success": True, "commitUrl": url, "commitOid": commits[-1].oid})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo, revision)
        if path not in commit.tree:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        data = commit.tree[path]
        self._send(200, data, {"ETag": f'"{_oid(path, data)}"', "X-Repo-Commit": commit.oid})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", _Handler.model_info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
