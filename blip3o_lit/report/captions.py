"""The section about captions: do generated tokens still find theirs, and name what they show?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite, mapping
from blip3o_lit.report.section import Section
from blip3o_lit.report.tables import table

FIRST = ["generated", "true"]
"""Sources of tokens that come first in a table."""
Leaf = tuple[list[str], dict[str, float]]
"""The innermost numbers of a block, after the names that lead to them."""


def retrieval(record: RunRecord) -> Section | None:
    """Return recall by direction, read-out and source of the tokens, and zero-shot accuracy."""
    recall, zero_shot = (mapping(record.evaluation.get(key)) for key in ("retrieval", "zero_shot"))
    recalls = [leaf for leaf in _leaves(recall) if any("@" in name for name in leaf[1])]
    accuracies = [leaf for leaf in _leaves(zero_shot) if "top1" in leaf[1]]
    if not recalls and not accuracies:
        return None
    depths = sorted({depth for _, shares in recalls for depth in shares}, key=_depth)
    own = str(recall.get("read_out", "tower"))
    lines = [
        [names[-1], names[0] if len(names) > 2 else own, names[-2] if len(names) > 1 else "", leaf]
        for names, leaf in recalls
    ]
    top = [["", names[0], names[-1], leaf] for names, leaf in accuracies]
    accuracy = (line[1:] for line in _ordered(top, ["top1", "agreement"]))
    facts = [
        f"{key} {zero_shot[key]:.4g}"
        for key in ("classes", "images", "chance")
        if finite(zero_shot.get(key)) is not None
    ]
    if strange := finite(zero_shot.get("strange")):
        facts.append(f"{strange:.0f} labels name no class")
    if "classes_from" in zero_shot:
        facts.append(f"classes are means of {zero_shot['classes_from']}")
    data: dict[str, Any] = {
        "recall": table(["Direction", "Read-out", "Tokens", *depths], _ordered(lines, depths)),
        "accuracy": table(["Read-out", "Tokens", "Top-1", "Agrees with true tokens"], accuracy),
        "facts": facts,
        "captioned": finite(recall.get("images")),
    }
    return Section("retrieval", "Captions", data)


def _leaves(block: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    for name, value in block.items():
        inner = mapping(value)
        numbers = {key: n for key, item in inner.items() if (n := finite(item)) is not None}
        if numbers and not any(mapping(item) for item in inner.values()):
            yield [*path, name], numbers
        else:
            yield from _leaves(inner, (*path, name))


def _ordered(lines: list[list[Any]], keys: list[str]) -> list[list[str | None]]:
    """Return three names and the shares of each line, generated tokens before true ones."""

    def place(line: list[Any]) -> tuple[Any, ...]:
        first = FIRST.index(line[2]) if line[2] in FIRST else len(FIRST)
        return line[0], line[1], first, line[2]

    return [
        [
            *(name.replace("_", " ") for name in names),
            *(f"{numbers[key]:.3f}" if key in numbers else None for key in keys),
        ]
        for *names, numbers in sorted(lines, key=place)
    ]


def _depth(name: str) -> tuple[int, str]:
    """Return what sorts `R@5` before `R@10`."""
    digits = name.rpartition("@")[2]
    return (int(digits) if digits.isdecimal() else 0, name)
