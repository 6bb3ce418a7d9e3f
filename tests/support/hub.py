"""A server that speaks as much of the hub's protocol as an upload needs, and keeps what it got.

with FakeHub() as hub:
    ...  # HF_ENDPOINT=hub.url
    assert hub.repos["me/model"].branches["main"] == {"config.json": b"..."}
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.local_http import LocalHttpServer

TOKEN = "hf_aSecretThatNobodyMayRead"
USER = "me"


@dataclass
class Repo:
    """Branch -> path -> bytes, and what else an upload says."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


class FakeHub(LocalHttpServer):
    """Attributes:
    refuse: path -> status; a request to a path that begins so is answered with it.
    requests: "METHOD path" of all requests.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # by sha256
        self.refuse: dict[str, int] = {}
        self.requests: list[str] = []
        self.answers_html = False
        super().__init__(_handler(self))

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = f"{body.get('organization') or USER}/{body['name']}"
        private = body.get("private") or body.get("visibility") == "private"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}  # fmt: skip
        self.repos[name] = Repo(bool(private))
        return 200, {"url": f"{self.url}/{name}", "name": name, "id": "1"}

    def info(self, name: str) -> tuple[int, Any]:
        repo = self.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": [], "tags": []}  # fmt: skip

    def branch(self, name: str, branch: str) -> tuple[int, Any]:
        branches = self.repos[name].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def preupload(
        self, name: str, branch: str, body: dict[str, Any]
    ) -> tuple[int, Any]:
        if branch not in self.repos[name].branches:
            return 404, {"error": f"Invalid rev id: {branch}"}
        files = []
        for file in body["files"]:
            is_large = file["path"].endswith(".safetensors")
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})  # fmt: skip
        return 200, {"files": files}

    def batch(self, body: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for wanted in body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.stored:
                upload = {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, oid: str, data: bytes) -> tuple[int, Any]:
        if hashlib.sha256(data).hexdigest() != oid:
            return 400, {"error": "wrong hash"}
        self.stored[oid] = data
        return 200, {}

    def commit(
        self, name: str, branch: str, lines: list[dict[str, Any]]
    ) -> tuple[int, Any]:
        repo = self.repos[name]
        files = dict(repo.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        repo.branches[branch] = files
        oid = "1" * 40
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        routes: list[tuple[str, Callable[..., tuple[int, Any]]]] = [
            (r"POST /api/repos/create", lambda: self.create(json.loads(body))),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/.*)?", self.info),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (
                r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)",
                lambda name, branch: self.preupload(name, branch, json.loads(body)),
            ),
            (
                r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch",
                lambda: self.batch(json.loads(body)),
            ),
            (r"PUT /lfs/([0-9a-f]{64})", lambda oid: self.store(oid, body)),
            (
                r"POST /api/models/([^/]+/[^/]+)/commit/(.+)",
                lambda name, branch: self.commit(name, branch, _ndjson(body)),
            ),
        ]
        for pattern, route in routes:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match is not None:
                return route(*map(unquote, match.groups()))
        return 404, {"error": f"no such endpoint: {method} {path}"}


def _ndjson(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines() if line.strip()]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            status, answer = self._answer(path, body)
            data = json.dumps(answer).encode()
            if hub.answers_html:
                data = b"<html>a proxy</html>"
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Message", str(answer.get("error")))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _answer(self, path: str, body: bytes) -> tuple[int, Any]:
            for prefix, status in hub.refuse.items():
                if path.startswith(prefix):
                    return status, {"error": f"refused with {status}"}
            needs_token = not path.startswith("/lfs/")
            if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return 401, {"error": "Invalid username or password."}
            return hub.answer(self.command, path, body)

        do_GET = do_POST = do_PUT = _respond

        def log_message(self, *_: object) -> None:
            return

    return Handler
