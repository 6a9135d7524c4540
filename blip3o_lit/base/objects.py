"""Files behind an address, whole, in parts, and back: buckets, web servers, the Hugging Face Hub.

A broken connection is opened again where it broke; what no new try can mend is one line.
"""

from __future__ import annotations

import configparser
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import obstore
from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, ObjectStore, from_url

from blip3o_lit.base.secrets import masked
from blip3o_lit.config.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "hf", "file")
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a broken connection is opened again; one more failure in a row ends it."""
CHUNK = 4 << 20
PART = 64 << 20
STREAMS = 4
"""Parts of a large file that are fetched at a time."""
CLIENT = {"timeout": "1 day", "connect_timeout": "20s", "read_timeout": "60s"}
RETRIES = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=5),
        "base": 2,
    },
}
_STATUS = re.compile(r"status code: (\d+) ([\w ]+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PASSING = (408, 425, 429)
"""Statuses below 500 that another try may mend."""
_METADATA = "169.254.169.254"
"""Where a client asks the machine for credentials when it was given none."""


def is_url(address: Path | str) -> bool:
    """Return whether this is an address, not a path; `pipe:` counts, to be refused."""
    return "://" in str(address) or str(address).startswith("pipe:")


class Objects:
    """The files below an address. Names are relative to it, with `/` between folders."""

    def __init__(self, url: str, pauses: tuple[float, ...] = PAUSES) -> None:
        self.url, self._pauses = url.rstrip("/"), pauses
        self._store = _connected(self.url)
        self._ranges: bool | None = None
        self._asking = threading.Lock()

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[Any]:
        """Yield the bytes from `start` to `end`, or to the end of the file."""
        place, failures = start, 0
        while True:
            try:
                for chunk in self._chunks(name, place, end):
                    place, failures = place + len(chunk), 0
                    yield chunk
                return
            except (BaseError, OSError) as error:
                if failures == len(self._pauses) or not why(error)[2]:
                    raise self._refused(name, error) from error
                time.sleep(self._pauses[failures])
                failures += 1

    def _chunks(self, name: str, start: int, end: int | None) -> Iterator[Any]:
        if start == 0 and end is None:
            yield from obstore.get(self._store, name).stream(CHUNK)
            return
        part: Any = {"offset": start} if end is None else (start, end)
        try:
            yield from obstore.get(self._store, name, options={"range": part}).stream(CHUNK)
        except NotSupportedError:  # a server without ranges: what comes before is passed over
            passed = 0
            for chunk in obstore.get(self._store, name).stream(CHUNK):
                first, passed = max(0, start - passed), passed + len(chunk)
                last = len(chunk) if end is None else len(chunk) - max(0, passed - end)
                if first < last:
                    yield bytes(chunk)[first:last]

    def download(
        self,
        name: str,
        descriptor: int,
        size: int,
        ended: Callable[[], bool] = lambda: False,
    ) -> int:
        """Write a file of that size, several parts of a large one at a time; return what came.

        Stops, with too few bytes, where there are more, and once `ended` says so.
        """

        def write(start: int, end: int) -> int:
            place = start
            for chunk in self.read(name, start, None if (start, end) == (0, size) else end):
                if ended() or place + len(chunk) > end:
                    return -1
                os.pwrite(descriptor, chunk, place)
                place += len(chunk)
            return place - start

        if size <= PART or not self._has_ranges(name):
            return write(0, size)
        starts = range(0, size, PART)
        with ThreadPoolExecutor(STREAMS, "parts") as pool:
            return sum(pool.map(write, starts, [min(start + PART, size) for start in starts]))

    def _has_ranges(self, name: str) -> bool:
        """Return whether parts of a file can be asked for; one answer for all files."""
        with self._asking:
            if self._ranges is None:
                try:
                    obstore.get_range(self._store, name, start=0, length=1)
                    self._ranges = True
                except NotSupportedError:
                    self._ranges = False
                except (BaseError, OSError):
                    return False  # reading says what is wrong
            return self._ranges

    def whole(self, name: str) -> bytes:
        return b"".join(bytes(chunk) for chunk in self.read(name))

    def whole_if_there(self, name: str) -> bytes | None:
        """Return a file's content; None where there is no such file.

        A bucket whose files may not be listed answers "forbidden" for what is not there.
        """
        try:
            obstore.head(self._store, name)
        except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError):
            return None
        except (BaseError, OSError):
            pass  # reading says what is wrong, after more tries
        return self.whole(name)

    def size(self, name: str) -> int | None:
        """Return a file's size, or None where it is not known."""
        try:
            return int(obstore.head(self._store, name)["size"])
        except (BaseError, OSError):
            return None

    def below(self, folder: str) -> dict[str, tuple[int, str]]:
        """Return size and version of all files in and below a folder, by name."""
        try:
            found = obstore.list(self._store, folder or None).collect()
        except (BaseError, OSError) as error:
            raise self._refused(folder, error) from error
        return {
            str(item["path"]): (int(item["size"]), f"{item['e_tag']} {item['last_modified']}")
            for item in found
        }

    def put(self, file: Path, name: str) -> None:
        """Copy a file there; it appears whole or not at all."""
        small = file.stat().st_size <= PART  # it may be written to meanwhile
        content = file.read_bytes() if small else file
        obstore.put(self._store, name, content, chunk_size=PART, max_concurrency=STREAMS)

    def copy(self, name: str, other: str) -> None:
        """Give a file there a second name."""
        obstore.copy(self._store, name, other)

    def delete(self, name: str) -> None:
        obstore.delete(self._store, name)

    def _refused(self, name: str, error: Exception) -> UserError:
        reason, mend, _ = why(error)
        place = masked(f"{self.url}/{name}" if name else self.url)
        return UserError(f"{place} can't be read ({reason}): {mend}")


def why(error: Exception) -> tuple[str, str, bool]:
    """Return what went wrong, what may mend it, and whether it may pass by itself."""
    text = str(error)
    code, status = _CODE.search(text), _STATUS.search(text)
    reason = code[1] if code else f"{status[1]} {status[2]}".strip() if status else ""
    if isinstance(error, FileNotFoundError):
        return reason or "it is not there", "check the address", False
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or "Missing Acc" in text:
        return reason or "no permission", f"check the credentials ({keys})", False
    if _METADATA in text:
        public = "AWS_SKIP_SIGNATURE=true where the bucket is public"
        return "no credentials were found", f"set {keys}; {public}", False
    if status and int(status[1]) < 500 and int(status[1]) not in _PASSING:
        return reason, "check the address", False
    plain = text.splitlines()[0] if text else type(error).__name__
    return reason or plain.rpartition(" - ")[2], "check the network", True


def _connected(url: str) -> ObjectStore:
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "://" not in url or "::" in url:
        raise UserError(f"{url}: {scheme}: is not read; use one of {', '.join(SCHEMES)}")
    client: dict[str, Any] = dict(CLIENT)
    settings: dict[str, Any] = {"client_options": client, "retry_config": RETRIES}
    try:
        if scheme == "hf":
            return _hub(url, client)
        if scheme.startswith("http"):
            client["allow_http"] = True
            return HTTPStore(url, client_options=client, retry_config=RETRIES)  # type: ignore[arg-type]
        if scheme == "file":
            return from_url(url)
        if scheme == "s3":
            settings |= _aws_files()
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            endpoint = endpoint or settings.get("endpoint", "")
            if endpoint.startswith("http://"):
                client["allow_http"] = True
        return from_url(url, **settings)
    except (BaseError, OSError, ValueError) as error:
        reason, mend, passing = why(error)
        mend = "check the address" if passing else mend
        raise UserError(f"{masked(url)} can't be read ({reason}): {mend}") from error


def _aws_files() -> dict[str, str]:
    """Return what the AWS files of a user say, of what the environment does not."""
    profile = os.environ.get("AWS_PROFILE", "default")
    known: dict[str, str] = {}
    files = (
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), profile),
        (
            os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
            profile if profile == "default" else f"profile {profile}",
        ),
    )
    for file, section in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.path.expanduser(file))
        except configparser.Error as error:
            raise UserError(f"{file} can't be read ({str(error).splitlines()[0]})") from error
        if parser.has_section(section):
            known |= dict(parser.items(section))
    env = os.environ
    out = {}
    if "AWS_ACCESS_KEY_ID" not in env and "aws_access_key_id" in known:
        for name in ("access_key_id", "secret_access_key", "session_token"):
            if f"aws_{name}" in known:
                out[name] = known[f"aws_{name}"]
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & env.keys() and "region" in known:
        out["region"] = known["region"]
    if not {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & env.keys() and "endpoint_url" in known:
        out["endpoint"] = known["endpoint_url"]
    return out


def _hub(url: str, client: dict[str, Any]) -> ObjectStore:
    """Return the files of `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`, or of a model's."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{url} can't be read: HF_HUB_OFFLINE is set")
    parts = url.removeprefix("hf://").split("/")
    kind = f"{parts.pop(0)}/" if parts[0] in ("datasets", "spaces") else ""
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{url}: write hf://datasets/ORG/NAME/FOLDER")
    name, _, revision = parts[1].partition("@")
    folder = "/".join(quote(part) for part in parts[2:])
    at = quote(revision or "main", safe="")
    base = f"{constants.ENDPOINT}/{kind}{parts[0]}/{name}/resolve/{at}/{folder}"
    client["allow_http"] = base.startswith("http://")
    if token := get_token():
        client["default_headers"] = {"Authorization": f"Bearer {token}"}
    return HTTPStore(base.rstrip("/"), client_options=client, retry_config=RETRIES)  # type: ignore[arg-type]
