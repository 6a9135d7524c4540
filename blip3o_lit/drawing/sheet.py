"""Drawn pictures for the eye: data URLs for a page, and one PNG of rows with their cosines."""

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 128
"""Pixels of a picture's longest side on a page or sheet."""
GAP, LINE = 8, 16
"""Pixels between pictures, and of a line of text."""
TITLE = 40
"""Letters of a title's line."""
INK, GROUND = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Drawing:
    """One picture of a row."""

    label: str
    """For example `input`, `true tokens`, `mean`, `sample 1`."""
    picture_3HW: Tensor
    """In 0..1."""
    cosine: float | None = None
    """Of its tokens to the true ones, where it has one."""


@dataclass(frozen=True)
class Row:
    """All pictures of one image."""

    title: str
    """For example `best`, `median` or `worst`, and the image's key."""
    drawings: Sequence[Drawing]


def image_of(picture_3HW: Tensor, side: int = SIDE) -> Image.Image:
    """Return a picture in 0..1 enlarged by a whole number, as near to `side` as that comes."""
    levels = (picture_3HW.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(levels.cpu().numpy()))
    times = max(1, round(side / max(image.size)))
    # Whole pixels: a smooth enlargement would hide what was drawn.
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as a PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    """Return an image as a PNG that a page holds itself."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def report_row(row: Row) -> dict[str, object]:
    """Return a row as `evaluation.json` keeps it; the page enlarges its pictures."""
    drawings = []
    for drawing in row.drawings:
        image = image_of(drawing.picture_3HW, side=1)
        image.thumbnail((SIDE, SIDE))
        cosine = {} if drawing.cosine is None else {"cosine": drawing.cosine}
        drawings.append({"label": drawing.label, "picture": data_url(image), **cosine})
    return {"title": row.title, "drawings": drawings}


def sheet(rows: Sequence[Row], side: int = SIDE) -> Image.Image:
    """Return all rows as one image: labels above, titles on the left, a cosine below each."""
    images = [[image_of(drawing.picture_3HW, side) for drawing in row.drawings] for row in rows]
    width = max(image.width for line in images for image in line)
    height = max(image.height for line in images for image in line)
    font = ImageFont.load_default(size=12)
    titles = [textwrap.wrap(row.title, TITLE) or [""] for row in rows]
    margin = GAP + max(round(font.getlength(part)) for title in titles for part in title) + GAP
    columns = max(len(row.drawings) for row in rows)
    step = height + LINE + GAP
    size = (margin + columns * (width + GAP), GAP + LINE + len(rows) * step)
    canvas = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(canvas)
    lefts = [margin + column * (width + GAP) for column in range(columns)]
    longest = max(rows, key=lambda row: len(row.drawings))
    for left, drawing in zip(lefts, longest.drawings):
        pen.text((left, GAP // 2), drawing.label, INK, font)
    for number, (row, line, title) in enumerate(zip(rows, images, titles)):
        top = GAP + LINE + number * step
        pen.text((GAP, top + height // 2), "\n".join(title), INK, font, anchor="lm")
        for left, drawing, image in zip(lefts, row.drawings, line):
            canvas.paste(image, (left, top))
            if drawing.cosine is not None:
                pen.text((left, top + height), f"{drawing.cosine:.4f}", INK, font)
    return canvas
