"""A stand-in for the Hugging Face Hub's HTTP API: repositories, commits, large files, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Keeps the files of each repository in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    """Answers what the hub's client asks for an upload and a download, and 404 to the rest."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        path = self.path.partition("?")[0].strip("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif "/paths-info/" in path:
            name = path.removeprefix("api/datasets/").partition("/paths-info/")[0]
            files = hub.repositories.get(name, {})
            asked = [line.partition("=")[2] for line in body.decode().split("&")]
            if "json" in self.headers.get("Content-Type", ""):
                asked = json.loads(body)["paths"]
            rows = ((p, len(files[p])) for p in asked if p in files)
            self.answer(
                [{"type": "file", "path": p, "size": size, "oid": "2" * 40} for p, size in rows]
            )
        elif path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            hub.repositories.setdefault(name, {})
            hub.private[name] = asked.get("private", asked.get("visibility") == "private")
            self.answer({"url": f"{hub.url}/{name}", "name": name})
        elif path == "api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            files = hub.repositories[name]
            for line in filter(None, body.splitlines()):
                step = json.loads(line)
                value = step["value"]
                if step["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif step["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            url = f"{hub.url}/{name}/commit/1"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})
        else:
            self.answer({"error": path}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.blobs[oid] = content
        self.answer(b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        plain = path.removeprefix("api/").removeprefix("models/").removeprefix("datasets/")
        repository = "/".join(plain.split("/")[:2])
        files = self.server.repositories.get(repository)
        name = path.rpartition("/")[2]
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            rows = ((name, len(content)) for name, content in files.items())
            self.answer(
                [{"type": "file", "path": p, "size": size, "oid": "2" * 40} for p, size in rows]
            )
        elif path.startswith("api/"):
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": repository, "modelId": repository, "private": False, "tags": []}
            self.answer({**facts, "sha": "1" * 40, "siblings": siblings, "downloads": 0})
        elif name in files:
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if found:
                first, last = int(found[1]), int(found[2] or len(files[name]) - 1)
                whole = f"bytes {first}-{last}/{len(files[name])}"
                part = files[name][first : last + 1]
                self.answer(part, 206, ETag=etag, X_Repo_Commit="1" * 40, Content_Range=whole)
            else:
                self.answer(files[name], ETag=etag, X_Repo_Commit="1" * 40)
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """Run a hub and point the client of this process at it, with a cache of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    constants = "huggingface_hub.constants."
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants + "ENDPOINT", hub.url)
            template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants + "HF_HUB_OFFLINE", False)
            patch.setattr(constants + "HF_HUB_DISABLE_XET", True)  # large files by plain HTTP
            patch.setattr(constants + "HF_HUB_CACHE", str(cache))
            patch.setenv("HF_TOKEN", TOKEN)
            yield hub
    finally:
        hub.shutdown()
        hub.server_close()
