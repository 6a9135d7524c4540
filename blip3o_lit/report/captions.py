"""The sections about pictures: which do their tokens find and name, and which came out how."""

import re
from collections.abc import Iterator
from typing import Any

from blip3o_lit.report.record import RunRecord, finite, mapping, mappings
from blip3o_lit.report.tables import Table, table
from blip3o_lit.report.templating import Section

FIRST = ["generated", "true"]
"""Sources of tokens that come first in a table."""
PICTURE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]+")
"""Pictures stand in the page itself; anything else is not shown."""
CAPTIONS = {
    "caption": "Caption",
    "caption_generated": "From generated tokens",
    "caption_true": "From true tokens",
}
READ_OUTS = {
    "cls": "the tower's own CLS token",
    "fitted": "a linear read-out fitted to the tower's own embeddings of training images",
    "patch_mean": "the mean of projected patches: a fallback where the tower pools otherwise",
}
Leaf = tuple[list[str], dict[str, float]]
"""The innermost numbers of a block, after the names that lead to them."""


def retrieval(record: RunRecord) -> Section | None:
    """Return recall by direction, read-out and source of the tokens, and zero-shot accuracy."""
    recall = mapping(record.evaluation.get("retrieval"))
    zero_shot = mapping(record.evaluation.get("zero_shot"))
    recalls = [leaf for leaf in _leaves(recall) if any("@" in name for name in leaf[1])]
    accuracies = [leaf for leaf in _leaves(zero_shot) if "top1" in leaf[1]]
    if not recalls and not accuracies:
        return None
    depths = sorted({depth for _, shares in recalls for depth in shares}, key=_depth)
    tower = str(recall.get("read_out", "tower"))
    by_direction: list[Leaf] = []
    for names, shares in recalls:
        read_out = names[0] if len(names) > 2 else tower
        source = names[-2] if len(names) > 1 else ""
        by_direction.append(([names[-1], read_out, source], shares))
    alike = [
        ([name], {"cosine": cosine})
        for name, value in mapping(recall.get("similarity")).items()
        if (cosine := finite(value)) is not None
    ]
    by_read_out = [([names[0], names[-1]], shares) for names, shares in accuracies]
    accuracy_heads = ["Read-out", "Tokens", "Top-1", "Agrees with true tokens"]
    data = {
        "recall": _shares(["Direction", "Read-out", "Tokens", *depths], depths, by_direction),
        "accuracy": _shares(accuracy_heads, ["top1", "agreement"], by_read_out),
        "similarity": _shares(["Tokens", "Cosine"], ["cosine"], alike),
        "similarity_by": READ_OUTS.get(str(recall.get("similarity_by")), tower),
        "facts": _facts(zero_shot),
        "captioned": finite(recall.get("images")),
    }
    return Section("retrieval", "Captions", data)


def images(record: RunRecord) -> Section | None:
    """Return the images that the evaluation singles out.

    `worst` is a list of `{key, cosine, caption, source}`. `examples` maps best, median and worst to
    such lists, with `picture` (a data URL), `caption_generated` and `caption_true`: the captions
    that generated and true tokens retrieve.
    """
    examples = mapping(record.evaluation.get("examples"))
    groups = {}
    for name in ("best", "median", "worst"):
        cards = [_card(item) for item in mappings(examples.get(name))]
        if cards:
            groups[name.capitalize()] = cards
    lowest = [
        [item.get("key", ""), _cosine(item), item.get("caption", ""), item.get("source", "")]
        for item in mappings(record.evaluation.get("worst"))
    ]
    if not groups and not lowest:
        return None
    worst = table(["Image", "Cosine", "Caption", "Source"], lowest)
    return Section("images", "Single images", {"groups": groups, "worst": worst})


def _leaves(block: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    for name, value in block.items():
        inner = mapping(value)
        numbers = {key: n for key, item in inner.items() if (n := finite(item)) is not None}
        if numbers and not any(mapping(item) for item in inner.values()):
            yield [*path, name], numbers
        else:
            yield from _leaves(inner, (*path, name))


def _shares(heads: list[str], keys: list[str], leaves: list[Leaf]) -> Table:
    """Return a line per leaf; its last name is the source, generated tokens before true ones."""

    def place(leaf: Leaf) -> tuple[Any, ...]:
        *others, source = leaf[0]
        return others, FIRST.index(source) if source in FIRST else len(FIRST), source

    lines = []
    for names, shares in sorted(leaves, key=place):
        cells = [f"{shares[key]:.3f}" if key in shares else None for key in keys]
        lines.append([*(name.replace("_", " ") for name in names), *cells])
    return table(heads, lines)


def _depth(name: str) -> tuple[int, str]:
    """Return what sorts `R@5` before `R@10`."""
    digits = name.rpartition("@")[2]
    return (int(digits) if digits.isdecimal() else 0, name)


def _facts(zero_shot: dict[str, Any]) -> list[str]:
    facts = [
        f"{key} {zero_shot[key]:.4g}"
        for key in ("classes", "images", "chance")
        if finite(zero_shot.get(key)) is not None
    ]
    if strange := finite(zero_shot.get("strange")):
        facts.append(f"{strange:.0f} labels name no class")
    if "classes_from" in zero_shot:
        facts.append(f"classes are means of {zero_shot['classes_from']}")
    return facts


def _card(item: dict[str, Any]) -> dict[str, Any]:
    picture = str(item.get("picture", ""))
    return {
        "key": item.get("key", ""),
        "cosine": _cosine(item) or "",
        "picture": picture if PICTURE.fullmatch(picture) else None,
        "caption": item.get("caption", ""),
        "captions": {label: item[key] for key, label in CAPTIONS.items() if item.get(key)},
    }


def _cosine(item: dict[str, Any]) -> str | None:
    value = finite(item.get("cosine"))
    return None if value is None else f"{value:.4f}"
