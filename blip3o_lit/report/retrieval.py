"""The section about retrieval: do generated tokens still find their caption?"""

from __future__ import annotations

from html import escape

from blip3o_lit.report import html
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite, headline, mapping, rows
from blip3o_lit.report.section import Section, source


def retrieval(record: RunRecord) -> Section | None:
    """Return the retrieval table: a row a direction and token source, a column a depth."""
    block = mapping(record.evaluation.get("retrieval"))
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for origin, directions in block.items():
        for direction, recalls in mapping(directions).items():
            numbers = {k: n for k, v in mapping(recalls).items() if (n := finite(v)) is not None}
            lines[direction, origin] = numbers
    if not lines:
        return None
    depths = sorted({depth for line in lines.values() for depth in line}, key=_depth)
    order = ["generated", "true"]
    rank = {origin: order.index(origin) if origin in order else len(order) for origin in block}
    about = escape(source(record, headline(rows(record))))
    read_out = f", read out by {escape(str(block['read_out']))}" if "read_out" in block else ""
    table = html.plain_table(
        ["Direction", "Tokens", *depths],
        [
            [_words(direction), _words(origin), *(_share(line.get(depth)) for depth in depths)]
            for (direction, origin), line in sorted(
                lines.items(), key=lambda item: (item[0][0], rank[item[0][1]], item[0][1])
            )
        ],
        f"Recall of captions by images and images by captions{read_out}: {about}.",
        "retrieval-table",
    )
    return Section(
        "retrieval",
        "Retrieval",
        table,
        "Whether generated tokens still find their caption, beside the true tokens.",
    )


def _depth(name: str) -> tuple[int, str]:
    """Return what sorts `R@5` before `R@10`."""
    digits = name.rpartition("@")[2]
    return (int(digits) if digits.isdigit() else 0, name)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace(".", ", ")
