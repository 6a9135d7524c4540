"""The section that the page opens with: rows of drawn tokens, and how near they come, in dB."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_lit.base.files import replacing
from blip3o_lit.config.errors import UserError
from blip3o_lit.report.captions import PICTURE
from blip3o_lit.report.record import RunRecord, finite, mapping, mappings
from blip3o_lit.report.scores import baseline, estimator, rows
from blip3o_lit.report.tables import Table, table
from blip3o_lit.report.templating import Section

NAMED = ("digit", "colour", "place", "all", "empty")
KINDS = ("digit", "nothing", "specks")
NAMES = {"true": "True tokens", "mean_token": "Mean token", "mean": "Posterior mean"}


def drawings(record: RunRecord) -> Section | None:
    """Return the pictures of `drawings` in the evaluation, or the reason why there are none."""
    block = mapping(record.evaluation.get("drawings"))
    if not block:
        return None
    shown = [row for item in mappings(block.get("rows")) if (row := _row(item)) is not None]
    decibels = [
        [row.label, row.number("psnr"), row.number("psnr_thumbnail")]
        for row in rows(record)
        if row.number("psnr") is not None
    ]
    data: dict[str, Any] = {
        "why_not": block.get("why_not"),
        "rows": shown,
        "by": str(block.get("by", "")),
        "images": finite(block.get("images")),
        "ceiling": finite(block.get("ceiling")),
        "psnr": table(["", "to the drawn true tokens, dB", "to the picture, dB"], decibels),
    }
    return Section("drawings", "Pictures", data)


def write_drawings(run_dir: Path, target: Path) -> Path:
    """Put the rows of a run's drawn tokens into one PNG."""
    # A page needs no torch.
    from torchvision.transforms.functional import to_tensor

    from blip3o_lit.drawing.sheet import Drawing, Row, png_bytes, sheet

    record = RunRecord.load(Path(run_dir))
    section = drawings(record)
    shown = section.data["rows"] if section is not None else []
    if not shown:
        raise UserError(f"{run_dir} has no drawn tokens: {record.evaluate_command}")
    lines = []
    for row in shown:
        pictures = []
        for item in row["drawings"]:
            content = base64.b64decode(item["picture"].partition(",")[2])
            picture_3HW = to_tensor(Image.open(io.BytesIO(content)).convert("RGB"))
            pictures.append(Drawing(item["label"], picture_3HW, item["cosine"]))
        lines.append(Row(row["title"], pictures))
    with replacing(target) as temporary:
        temporary.write_bytes(png_bytes(sheet(lines)))
    return target


def hidden_half(record: RunRecord) -> Section | None:
    """Return what samples show in the half that the condition tower never saw, beside the truth."""
    block = mapping(mapping(record.evaluation.get("drawings")).get("hidden_half"))
    shares = mapping(block.get("shares"))
    if not shares:
        return None
    order = ["true", *(row.key for row in rows(record))]
    lines = [
        [_name(key, record), *(mapping(shares[key]).get(kind) for kind in KINDS)]
        for key in order
        if key in shares
    ]
    data = {
        "shares": table(["", *(f"{kind}, share of images" for kind in KINDS)], lines),
        "draws": _draws(mapping(block.get("draws"))),
        "reader": finite(mapping(block.get("reader_on_true_tokens")).get("digit")),
    }
    return Section("hidden_half", "The hidden half", data)


def named(record: RunRecord) -> Section | None:
    """Return how often drawn scenes show what their captions name, beside true ones and chance."""
    block = mapping(mapping(record.evaluation.get("drawings")).get("named"))
    shares, swapped = mapping(block.get("shares")), mapping(block.get("swapped"))
    if not shares:
        return None
    ones = mapping(block.get("one_digit"))
    lines = [
        [
            _name(key, record),
            *(mapping(shares[key]).get(flag) for flag in NAMED),
            mapping(ones.get(key)).get("digit"),
            mapping(swapped.get(key)).get("all"),
        ]
        for key in ["true", *(row.key for row in rows(record))]
        if key in shares
    ]
    heads = ["", "digit", "colour", "place", "all three", "left empty"]
    data = {
        "shares": table([*heads, "digit of one-digit scenes", "all three, other caption"], lines),
        "captions": finite(block.get("captions")),
        "best": [
            [name.removeprefix("named_").replace("_", " "), finite(scale)]
            for name, scale in mapping(
                mapping(record.evaluation.get("guidance")).get("best")
            ).items()
        ],
    }
    return Section("named", "What captions name", data)


def _draws(block: dict[str, Any]) -> Table | None:
    count = finite(block.get("samples"))
    if count is None:
        return None
    true = block.get("different_halves_of_as_many_true_images")
    lines = [
        ["Samples of one condition", block.get("different_halves")],
        ["As many true images", true],
    ]
    return table(["", f"different hidden halves among {count:.0f}"], lines)


def _name(key: str, record: RunRecord) -> str:
    if key in NAMES:
        return NAMES[key]
    return estimator(key) if key in mapping(record.evaluation.get("estimators")) else baseline(key)


def _row(item: dict[str, Any]) -> dict[str, Any] | None:
    drawn = []
    for drawing in mappings(item.get("drawings")):
        picture, cosine = str(drawing.get("picture", "")), finite(drawing.get("cosine"))
        if PICTURE.fullmatch(picture):
            label = drawing.get("label", "")
            drawn.append({"label": label, "picture": picture, "cosine": cosine})
    return {"title": item.get("title", ""), "drawings": drawn} if drawn else None
