"""Tokens of captions in a folder: tokens.safetensors, captions.txt, and drawings where asked for.

Until all captions have been sampled their tokens lie in `parts/`, a file for each batch, named by
its first caption; a file is whole or not there, so a stopped command goes on behind the last one.
Shape suffixes: K samples, B captions, N target tokens, D target width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from blip3o_lit.base.files import replacing, write_synced
from blip3o_lit.base.progress import Work
from blip3o_lit.drawing.drawer import Drawer
from blip3o_lit.drawing.sheet import Drawing, Row, image_of, sheet
from blip3o_lit.translation.begun import begin

TOKENS_FILE, CAPTIONS_FILE, SHEET_FILE = "tokens.safetensors", "captions.txt", "sheet.png"
DRAWINGS, PARTS = "drawings", "parts"


class PromptsFolder:
    """The folder of a file of captions; `settings` are all that the tokens are a function of.

    Raises:
        UserError: If it was begun with other settings, which are named, or by another command.
    """

    def __init__(self, out: Path, captions: Sequence[str], settings: dict[str, Any]) -> None:
        self.out, self.captions, self.settings = out, captions, settings
        begin(out, settings, (TOKENS_FILE, "index.json"))
        whole = (out / TOKENS_FILE).is_file()
        self.sampled = len(captions) if whole else sum(self._parts().values())
        """How many captions have tokens, from the first on."""

    def add(self, tokens_KBND: Tensor) -> None:
        """Keep the samples of the next captions."""
        content = save({"tokens": tokens_KBND.cpu().contiguous()})
        write_synced(self._part(self.sampled), content)
        self.sampled += tokens_KBND.shape[1]

    def finish(self) -> None:
        """Join the parts into one file beside the captions."""
        if not (self.out / TOKENS_FILE).is_file():
            with replacing(self.out / CAPTIONS_FILE) as temporary:
                temporary.write_text("\n".join(self.captions) + "\n", "utf-8")
            tokens_KBND = torch.cat([load_file(part)["tokens"] for part in self._parts()], 1)
            facts = {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in self.settings.items()
            }
            with replacing(self.out / TOKENS_FILE) as temporary:
                save_file({"tokens": tokens_KBND}, temporary, metadata=facts)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)

    def draw(self, drawer: Drawer, line_seconds: float = 10.0) -> None:
        """Write `drawings/CAPTION-SAMPLE.png`, numbered from 0, and a sheet of all."""
        tokens_KBND = load_file(self.out / TOKENS_FILE)["tokens"]
        (self.out / DRAWINGS).mkdir(exist_ok=True)
        rows = []
        with Work("drawing", len(self.captions), "captions", line_seconds) as work:
            for number, caption in enumerate(self.captions):
                drawings = []
                for draw, picture in enumerate(drawer.draw(tokens_KBND[:, number]).cpu()):
                    file = self.out / DRAWINGS / f"{number:05d}-{draw}.png"
                    with replacing(file) as temporary:
                        image_of(picture).save(temporary, "PNG")
                    drawings.append(Drawing(f"sample {draw + 1}", picture))
                rows.append(Row(caption, drawings))
                work.advance(1)
        with replacing(self.out / SHEET_FILE) as temporary:
            sheet(rows).save(temporary, "PNG")

    def _parts(self) -> dict[Path, int]:
        """Return the files that follow each other from the first caption on, and their captions."""
        found: dict[Path, int] = {}
        while (part := self._part(sum(found.values()))).is_file():
            with safe_open(part, "pt") as file:
                found[part] = file.get_slice("tokens").get_shape()[1]
        return found

    def _part(self, first: int) -> Path:
        return self.out / PARTS / f"{first:08d}.safetensors"
