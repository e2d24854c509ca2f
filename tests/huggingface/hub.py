"""A stand-in for the Hugging Face Hub, in memory: what uploads and downloads of models ask of its API."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from huggingface_hub import ModelCard


class _Hub(ThreadingHTTPServer):
    """Files by repository, of other branches than main by NAME@BRANCH; a commit is the digest of all."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.uploaded: dict[str, bytes] = {}  # large files by their SHA-256
        self.commits: list[str] = []  # the repositories that were committed to
        self.unknown: list[str] = []  # requests that the stand-in does not know


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            name = self._owned(json.loads(body))
            is_new = name not in self.server.repositories
            self.server.repositories.setdefault(name, {})
            self._send_json({"url": f"{self.server.url}/{name}"}, 200 if is_new else 409)
        elif self.path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])  # raises an error if it is damaged
            self._send_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path):
            files = self.server.repositories[found[1]]
            self.server.repositories.setdefault(f"{found[1]}@{found[2]}", dict(files))
            self._send_json({})
        elif re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            uploads = [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")]}
                for file in files
            ]
            self._send_json({"files": [{**upload, "shouldIgnore": False} for upload in uploads]})
        elif re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._send_json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path):
            name = self._branch(found[1], found[2])
            files = self.server.repositories[name]
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.uploaded[value["oid"]]
                else:
                    assert entry["key"] == "header", entry
            self.server.commits.append(name)
            commit = self._commit(name)
            self._send_json(
                {
                    "commitUrl": f"{self.server.url}/{name}/commit/{commit}",
                    "commitOid": commit,
                    "success": True,
                }
            )
        else:
            self._refuse()

    def do_PUT(self) -> None:
        body = self._body()
        digest = hashlib.sha256(body).hexdigest()
        if self.path != f"/lfs/{digest}":
            return self._refuse()
        self.server.uploaded[digest] = body
        return self._send(b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self._send_file(self._branch(found[1], found[2]), found[3])
        if found := re.fullmatch(r"/api/models/(.+?)/tree/[^/]+(?:/(.*))?", path):
            folder = f"{found[2]}/" if found[2] else ""
            files = self.server.repositories.get(found[1], {})
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": hashlib.sha256(content).hexdigest(),
                }
                for name, content in files.items()
                if name.startswith(folder)
            ]
            return self._send_json(entries) if entries else self._send_json({}, 404, "EntryNotFound")
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/[^/]+)?", path):
            name = found[1]
            if name not in self.server.repositories:
                return self._send_json({}, 404, "RepoNotFound")
            siblings = [{"rfilename": file} for file in self.server.repositories[name]]
            return self._send_json({"id": name, "sha": self._commit(name), "siblings": siblings})
        return self._refuse()

    def do_HEAD(self) -> None:
        self.do_GET()

    @staticmethod
    def _owned(wanted: dict[str, Any]) -> str:
        return f"{wanted.get('organization') or 'user'}/{wanted['name']}"

    def _branch(self, name: str, revision: str) -> str:
        branch = f"{name}@{revision}"
        return branch if branch in self.server.repositories else name

    def _commit(self, name: str) -> str:
        digest = hashlib.sha1()
        for file, content in sorted(self.server.repositories[name].items()):
            digest.update(file.encode() + content)
        return digest.hexdigest()

    def _send_file(self, name: str, file: str) -> None:
        content = self.server.repositories.get(name, {}).get(file)
        if content is None:
            missing = "EntryNotFound" if name in self.server.repositories else "RepoNotFound"
            return self._send_json({}, 404, missing)
        digest = hashlib.sha256(content).hexdigest()
        return self._send(content, {"ETag": f'"{digest}"', "X-Repo-Commit": self._commit(name)})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _refuse(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._send_json({"error": "not known here"}, 501)

    def _send_json(self, content: Any, status: int = 200, error: str | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        if error is not None:
            headers["X-Error-Code"] = error
        self._send(json.dumps(content).encode(), headers, status)

    def _send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve_hub() -> Iterator[_Hub]:
    """Serve an empty stand-in on this machine."""
    hub = _Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
