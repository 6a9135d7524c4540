"""A real S3 server on this machine: buckets are folders, objects files, signatures are checked."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}


class Bucket:
    """Where the server keeps its bucket, and what it was asked for."""

    def __init__(self, folder: Path, log: Path, endpoint: str) -> None:
        self.folder, self.log, self.endpoint = folder, log, endpoint

    @property
    def variables(self) -> dict[str, str]:
        """What a client's environment needs."""
        return KEYS | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1"}

    def upload(self, store: Path, name: str) -> str:
        """Put a folder into the bucket and return its address."""
        shutil.copytree(store, self.folder / name)
        return f"s3://{BUCKET}/{name}"

    def asked(self, name: str) -> list[str]:
        """Return the objects below a name that were read, in order."""
        lines = re.findall(rf'"GET /{BUCKET}/{name}/(\S+) HTTP', self.log.read_text())
        return [line.partition("?")[0] for line in lines]


@contextmanager
def serving(folder: Path) -> Iterator[Bucket]:
    """Run the server on a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "data" / BUCKET).mkdir(parents=True)
    own = {"NANIO_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"]}
    own["NANIO_SECRET_KEY"] = KEYS["AWS_SECRET_ACCESS_KEY"]
    words = ["--data-dir", str(folder / "data"), "--host", "127.0.0.1", "--port", str(port)]
    program = Path(sys.executable).with_name("nanio")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [program, "serve", *words], env={**os.environ, **own}, stdout=log, stderr=log
        )
        try:
            for _ in range(300):
                with socket.socket() as test:
                    if test.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield Bucket(folder / "data" / BUCKET, folder / "log", f"http://127.0.0.1:{port}")
        finally:
            server.kill()
            server.wait()
