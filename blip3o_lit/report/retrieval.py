"""The section about captions: do generated tokens still find theirs, and name what they show?"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from blip3o_lit.report import html
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite, headline, mapping, rows
from blip3o_lit.report.section import Section, source

FIRST = ("generated", "true")
"""Sources of tokens that come first in a table."""


def retrieval(record: RunRecord) -> Section | None:
    """Return recall by direction, read-out and source of the tokens, and zero-shot accuracy."""
    about = escape(source(record, headline(rows(record))))
    block, zero_shot = (mapping(record.evaluation.get(name)) for name in ("retrieval", "zero_shot"))
    body = ""
    recalls = [path for path in _leaves(block) if any("@" in name for name in path[1])]
    if recalls:
        own = str(block.get("read_out", "tower"))
        images = finite(block.get("images"))
        counted = f" ({images:.0f} images have one)" if images is not None else ""
        depths = sorted({depth for _, leaf in recalls for depth in leaf}, key=_depth)
        lines = []
        for (*read_out, origin, direction), leaf in recalls:
            shares = [_share(leaf.get(depth)) for depth in depths]
            lines.append([_words(direction), read_out[0] if read_out else own, origin, *shares])
        body += html.plain_table(
            ["Direction", "Read-out", "Tokens", *depths],
            _ordered(lines),
            f"Recall of captions by images, and of images by captions{counted}: {about}.",
            "retrieval-table",
        )
    accuracies = [path for path in _leaves(zero_shot) if "top1" in path[1]]
    if accuracies:
        lines = [
            [names[0], "", names[-1], _share(leaf["top1"]), _share(leaf.get("agreement"))]
            for names, leaf in accuracies
        ]
        facts = [
            f"{key} {value:.4g}"
            for key in ("classes", "images", "chance")
            if (value := finite(zero_shot.get(key))) is not None
        ]
        if strange := finite(zero_shot.get("strange")):
            facts.append(f"{strange:.0f} labels name no class")
        if "classes_from" in zero_shot:
            facts.append(f"classes are means of {zero_shot['classes_from']}")
        body += html.plain_table(
            ["Read-out", "Tokens", "Top-1", "Agrees with true tokens"],
            [[line[0], *line[2:]] for line in _ordered(lines)],
            f"Zero-shot classification ({escape(', '.join(facts))}): {about}.",
            "zero-shot-table",
        )
    if not body:
        return None
    return Section(
        "retrieval",
        "Captions",
        body,
        "Whether generated tokens still find their caption, beside the true tokens.",
    )


def _leaves(
    block: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """Yield each innermost dict of numbers and the names that lead to it."""
    for name, value in block.items():
        inner = mapping(value)
        numbers = {k: n for k, v in inner.items() if (n := finite(v)) is not None}
        if numbers and path + (name,) and not any(mapping(v) for v in inner.values()):
            yield path + (name,), numbers
        elif inner:
            yield from _leaves(inner, path + (name,))


def _ordered(lines: list[list[Any]]) -> list[list[Any]]:
    """Sort by direction and read-out; generated and true tokens first. Names become words."""

    def key(line: list[Any]) -> tuple[Any, ...]:
        origin = str(line[2])
        rank = FIRST.index(origin) if origin in FIRST else len(FIRST)
        return line[0], line[1], rank, origin

    return [
        [_words(str(c)) if c and not _number(c) else c for c in line]
        for line in sorted(lines, key=key)
    ]


def _number(value: object) -> bool:
    return str(value).replace(".", "").isdigit()


def _depth(name: str) -> tuple[int, str]:
    """Return what sorts `R@5` before `R@10`."""
    digits = name.rpartition("@")[2]
    return (int(digits) if digits.isdigit() else 0, name)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _words(name: str) -> str:
    return name.replace("_", " ")
