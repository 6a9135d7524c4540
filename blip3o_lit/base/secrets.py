"""Secrets stay out of what a run writes: values of the environment, and passwords in addresses."""

import os
import re
from typing import TypeVar

Plain = TypeVar("Plain")
MASK = "***"
SHORTEST = 8
_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)_?KEY)(_|$)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+(?=@)")


def masked(value: Plain) -> Plain:
    """Return plain data with secrets replaced in all of its texts.

    A secret is the value, of 8 characters or more, of an environment variable whose name says so
    (`HF_TOKEN`, `WANDB_API_KEY`, `AWS_SECRET_ACCESS_KEY`), or name and password in an address.
    """
    secrets = {text for name, text in os.environ.items() if _NAME.search(name)}
    return _mask(value, sorted((s for s in secrets if len(s) >= SHORTEST), key=len, reverse=True))


def _mask(value: Plain, secrets: list[str]) -> Plain:
    if isinstance(value, dict):
        return type(value)({key: _mask(item, secrets) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_mask(item, secrets) for item in value)
    if isinstance(value, str):
        text: str = value
        for secret in secrets:
            text = text.replace(secret, MASK)
        return _ADDRESS.sub(MASK, text)  # type: ignore[return-value]
    return value
