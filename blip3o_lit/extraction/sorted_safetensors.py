"""Safetensors whose bytes are a function of their content."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import save


def sorted_safetensors(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """Serialise with a sorted header; the library writes metadata in random order."""
    content = save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
