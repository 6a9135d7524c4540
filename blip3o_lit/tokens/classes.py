"""Embeddings of class prompts: what zero-shot compares an image's embedding with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_lit.config.errors import UserError

CLASSES_FILE = "classes.safetensors"


@dataclass(frozen=True)
class Classes:
    """Named classes, each with the embedding of its prompts."""

    names: list[str]
    text_KP: Tensor
    """Mean of each class's prompt embeddings `[classes, width]`, fp32, unit norm."""
    tower: str
    """The encoder whose text side made them."""

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {"text": self.text_KP}, {"classes": json.dumps(self.names), "tower": self.tower}

    @classmethod
    def load(cls, folder: Path | str) -> Classes | None:
        """Read a store's classes; None where it has none."""
        file = Path(folder) / CLASSES_FILE
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                facts, text_KP = opened.metadata() or {}, opened.get_tensor("text")
            names = [str(name) for name in json.loads(facts["classes"])]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: delete it, or extract again") from error
        if text_KP.ndim != 2 or len(text_KP) != len(names):
            raise UserError(f"{file} names {len(names)} classes, it holds {list(text_KP.shape)}")
        return cls(names, text_KP.float(), facts.get("tower", ""))
