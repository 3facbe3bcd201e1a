"""A small Hub on 127.0.0.1: the few endpoints `snapshot_download` uses for dataset repositories, and plain files.

    GET       /api/datasets/OWNER/NAME/revision/REV     commit and file names (REV: commit, branch or tag)
    GET       /api/datasets/OWNER/NAME/tree/REV         every file with its size
    GET HEAD  /datasets/OWNER/NAME/resolve/REV/PATH     a file, or from a byte on (Range)
    GET HEAD  /files/PATH                               a file outside any repository

and those of `create_commit`:

    POST      /api/repos/create                         409 if it is there
    POST      /api/validate-yaml
    POST      /api/datasets/OWNER/NAME/preupload/REV    data files go to LFS
    POST      /datasets/OWNER/NAME.git/info/lfs/objects/batch
    PUT       /lfs/SHA256
    POST      /api/datasets/OWNER/NAME/commit/REV       lines of JSON

Every request is recorded; a connection can be cut half way through a file; a silent server accepts and never answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ALWAYS = -1


class HubServer:
    """Serves while the `with` block lasts. Repositories are plain dicts: repo → commit → path → content."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.files: dict[str, bytes] = {}
        self.lfs: dict[str, bytes] = {}  # SHA-256 → content that was uploaded
        self.private: set[str] = set()  # repositories that need the token "secret"
        self.on_put: Callable[[], None] = lambda: None  # called before a file is taken
        self.on_get: Callable[[str], None] = lambda path: None  # called before a file is given
        self.hidden: set[str] = set()  # paths answered with 404 although the listing names them
        self.cuts: dict[str, int] = {}  # path → connections still to be cut half way, or ALWAYS
        self.down = False  # every answer is 503
        self.chunked = False  # plain files without Content-Length, as some hosts send them
        self.requests: list[tuple[str, str]] = []  # (method, path), in order
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def push(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        """A new commit with exactly these files, and `ref` moved to it. Returns the commit."""
        digest = hashlib.sha1(repo.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + b"\0" + content)
        commit = digest.hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[ref] = commit
        return commit

    def take_requests(self) -> list[tuple[str, str]]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                hub._answer(self, path)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
                while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                    body += self.rfile.read(size + 2)[:-2]
                hub._take(self, path, body)

            do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        if self.down:
            return _refuse(request, "", 503)
        if path.startswith("/files/"):
            content = self.files.get(path.removeprefix("/files/"))
            return _refuse(request, "") if content is None else self._send_file(request, path, content, {})
        match = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path)
        has_token = request.headers.get("Authorization") == "Bearer secret"
        if match is None or match[1] not in self.commits or (match[1] in self.private and not has_token):
            return _refuse(request, "RepoNotFound")
        repo, what, revision, name = match.groups()
        commit = self.refs[repo].get(revision, revision)
        files = self.commits[repo].get(commit)
        if files is None:
            return _refuse(request, "RevisionNotFound")
        if what == "revision":
            return _send_json(request, {"id": repo, "sha": commit, "siblings": [{"rfilename": p} for p in files]})
        if what == "tree":
            return _send_json(request, [_tree_entry(p, content) for p, content in files.items()])
        if name not in files or path in self.hidden:
            return _refuse(request, "EntryNotFound")
        return self._send_file(request, path, files[name], {"X-Repo-Commit": commit})

    def _take(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        """A step of a push."""
        if path == "/api/validate-yaml":
            return _send_json(request, {"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            self.on_put()
            self.lfs[hashlib.sha256(body).hexdigest()] = body
            return _send_json(request, {})
        if request.headers.get("Authorization") != "Bearer secret":
            return _refuse(request, "", 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.commits:
                return _send_json(request, {"url": f"{self.url}/datasets/{repo}"}, 409)
            self.private |= {repo} if asked.get("visibility") == "private" else set()
            self.push(repo, {".gitattributes": b"*.npy filter=lfs"})
            return _send_json(request, {"url": f"{self.url}/datasets/{repo}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.lfs:
                    one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            return _send_json(request, {"transfer": "basic", "objects": objects})
        repo, what, revision = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(preupload|commit)/(.+)", path).groups()
        old = self.commits[repo][self.refs[repo][revision]]
        if what == "preupload":
            named = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith((".npy", ".parquet")) else "regular") for f in named]
            answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]
            return _send_json(request, {"files": answer})
        header, *lines = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit", self.refs[repo][revision]) != self.refs[repo][revision]:
            return _refuse(request, "", 412)
        files = dict(old)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "deletedFile":
                del files[value["path"]]
            else:
                content = self.lfs[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
                files[value["path"]] = content
        commit = self.push(repo, files, revision)
        return _send_json(
            request, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/datasets/{repo}/commit/{commit}"}
        )

    def _send_file(self, request: BaseHTTPRequestHandler, path: str, content: bytes, headers: dict[str, str]) -> None:
        start = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or ["", "0"])[1])
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Accept-Ranges", "bytes")
        for key, value in headers.items():
            request.send_header(key, value)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = content[start:]
        if self.chunked:
            request.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        self.on_get(path)
        cuts = self.cuts.get(path, 0)
        if cuts:
            self.cuts[path] = cuts - 1 if cuts > 0 else ALWAYS
            body = body[: len(body) // 2]
            request.close_connection = True
        request.wfile.write(body)


class SilentServer:
    """Accepts connections and never says a word, as a firewall that swallows packets seems to do."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.connections: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> SilentServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for connection in [*self.connections, self._socket]:
            connection.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                self.connections.append(self._socket.accept()[0])
            except TimeoutError:
                continue


def closed_port() -> str:
    """The address of a port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _send_json(request: BaseHTTPRequestHandler, value: object, status: int = 200) -> None:
    body = json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _refuse(request: BaseHTTPRequestHandler, code: str, status: int = 404) -> None:
    request.send_response(status)
    if code:
        request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()
