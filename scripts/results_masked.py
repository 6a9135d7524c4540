"""The part of docs/results.md on scenes whose condition shows their left half alone."""

from __future__ import annotations

from statistics import mean
from typing import Any

from recipes import DEFAULT, LARGER
from results_found import Found, over_seeds, scores_of, table

KINDS = ("digit", "nothing", "specks")


def masked(found: Found) -> list[str]:
    """Return the scores on `demo_masked`, whose hidden half must be guessed."""
    scored = scores_of(found, DEFAULT, "demo_masked")
    if not scored:
        return []
    rows = []
    for name in ("mean", "ab2-4", "fitted-4", "ab2-8", "fitted-8", "heun-10"):
        rows.append([name, *_masked_cells([s["estimators"][name] for s in scored])])
    for name in ("regression", "ridge", "mean_token"):
        rows.append([name, *_masked_cells([s["baselines"][name] for s in scored])])
    floor = mean(s["frechet_floor"]["frechet_token"] for s in scored)
    rows.append(["two halves of the true images", "-", f"{floor:.3f}"])
    return [
        "On `demo_masked` the condition shows the left half of a scene; the rest must be guessed.",
        f"Frechet distances are over {256 * 256:,} tokens.",
        "",
        *table(["tokens of", "cosine", "token Frechet"], rows),
    ]


def larger(found: Found) -> list[str]:
    """Return the same of a larger network."""
    scored = scores_of(found, LARGER, "demo_masked_large")
    if not scored:
        return []
    names = list(scored[0]["estimators"])
    rows = [[n, *_masked_cells([s["estimators"][n] for s in scored])] for n in names]
    return [
        "The same by `experiment=demo_large` (256 wide, 4 deep):",
        "",
        *table(["tokens of", "cosine", "token Frechet"], rows),
    ]


def _masked_cells(blocks: list[dict[str, Any]]) -> list[str]:
    cosine = over_seeds([block["cosine"] for block in blocks])
    return [cosine, f"{mean(block['frechet_token'] for block in blocks):.3f}"]


def hidden_halves(found: Found) -> list[str]:
    """Return what a reader of drawn digits finds in the hidden half, beside the truth."""
    lines: list[str] = []
    for testbed, recipe in (("demo_masked", DEFAULT), ("demo_masked_large", LARGER)):
        halves = [
            scores["drawings"]["hidden_half"]
            for scores in scores_of(found, recipe, testbed)
            if "hidden_half" in scores.get("drawings", {})
        ]
        if not halves:
            continue
        rows = [
            [name, *(over_seeds([half["shares"][name][kind] for half in halves]) for kind in KINDS)]
            for name in halves[0]["shares"]
        ]
        right = mean(half["reader_on_true_tokens"]["digit"] for half in halves)
        lines += [f"### {testbed}", "", *table(["tokens of", *KINDS], rows)]
        lines += [f"Of the digits in drawn true tokens the reader names {right:.0%} right.", ""]
    if not lines:
        return []
    return [
        "## Hidden halves, read",
        "",
        "Shares of images whose unseen half, drawn from tokens, shows a readable digit, nothing or",
        "specks that are neither; the reader was fitted on training scenes.",
        "",
        *lines,
    ]
