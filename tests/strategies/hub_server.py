"""A small Hub on 127.0.0.1: the few endpoints `snapshot_download` uses for dataset repositories, and plain files.

    GET       /api/datasets/OWNER/NAME/revision/REV     commit and file names (REV: commit, branch or tag)
    GET       /api/datasets/OWNER/NAME/tree/REV         every file with its size
    GET HEAD  /datasets/OWNER/NAME/resolve/REV/PATH     a file, or from a byte on (Range)
    GET HEAD  /files/PATH                               a file outside any repository

Every request is recorded; a connection can be cut half way through a file; a silent server accepts and never answers.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ALWAYS = -1


class HubServer:
    """Serves while the `with` block lasts. Repositories are plain dicts: repo → commit → path → content."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.files: dict[str, bytes] = {}
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
        if match is None or match[1] not in self.commits:
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


def _send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    body = json.dumps(value).encode()
    request.send_response(200)
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
