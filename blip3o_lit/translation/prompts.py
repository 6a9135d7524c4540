"""Tokens of captions in a folder: tokens.safetensors, captions.txt, and drawings where asked for.

Shape suffixes: K samples, B captions, N target tokens, D target width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from blip3o_lit.base.files import replacing
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.drawing.drawer import Drawer
from blip3o_lit.drawing.sheet import Drawing, Row, image_of, sheet

TOKENS_FILE, CAPTIONS_FILE, SHEET_FILE = "tokens.safetensors", "captions.txt", "sheet.png"
DRAWINGS = "drawings"


def save_prompts(
    out: Path,
    captions: Sequence[str],
    tokens_KBND: Tensor,
    checkpoint: str,
    solver: SolverConfig,
    seed: int,
) -> None:
    """Write the tokens, with what they are a function of, and their captions in order."""
    facts = {"checkpoint": checkpoint, "solver": json.dumps(asdict(solver)), "seed": str(seed)}
    with replacing(out / TOKENS_FILE) as temporary:
        save_file({"tokens": tokens_KBND.contiguous()}, temporary, metadata=facts)
    with replacing(out / CAPTIONS_FILE) as temporary:
        temporary.write_text("\n".join(captions) + "\n", "utf-8")


def draw_prompts(
    out: Path,
    captions: Sequence[str],
    tokens_KBND: Tensor,
    drawer: Drawer,
) -> None:
    """Write `drawings/CAPTION-SAMPLE.png`, numbered from 0, and a sheet of all."""
    (out / DRAWINGS).mkdir(exist_ok=True)
    rows = []
    for number, caption in enumerate(captions):
        drawings = []
        for draw, picture in enumerate(drawer.draw(tokens_KBND[:, number]).cpu()):
            with replacing(out / DRAWINGS / f"{number:05d}-{draw}.png") as temporary:
                image_of(picture).save(temporary, "PNG")
            drawings.append(Drawing(f"sample {draw + 1}", picture))
        rows.append(Row(caption, drawings))
    with replacing(out / SHEET_FILE) as temporary:
        sheet(rows).save(temporary, "PNG")
