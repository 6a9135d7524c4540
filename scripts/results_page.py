"""docs/results.md from evaluations: tables of recipes, and each claim beside its target."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from recipes import DEFAULT, PARTS, RECIPES, RUNS, SEED_RECIPES, WIDTHS, Recipe, Run

Found = dict[Run, dict[str, Any]]
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Two-sided 95 % quantile of Student's t by degrees of freedom."""
FEW = ("mean", "euler-4")
"""Estimators of at most 4 network evaluations."""


def write_page(path: Path, found: Found) -> None:
    """Write the page; recipes and seeds that are missing are said to be."""
    parts = [
        *_head(found),
        *_claims(found),
        *_parts(found, "linear_gaussian"),
        *_parts(found, "demo"),
        *_seeds(found),
        *_widths(found),
        *_ambiguous(found),
        *_masked(found),
        *_curve(found),
        *_honesty(found),
    ]
    path.write_text("\n".join(parts) + "\n", "utf-8")


def _of(found: Found, recipe: Recipe, testbed: str) -> list[dict[str, Any]]:
    return [
        scores for run, scores in found.items() if (run.recipe, run.testbed) == (recipe, testbed)
    ]


def _estimator(scores: dict[str, Any], name: str, key: str = "cosine") -> float | None:
    return scores["estimators"].get(name, {}).get(key)


def _over_seeds(values: list[float | None]) -> str:
    """Return the mean and, with more than one seed, half the range."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    half = (max(numbers) - min(numbers)) / 2
    return f"{mean(numbers):.4f}" + (f" ({half:.4f})" if len(numbers) > 1 else "")


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _head(found: Found) -> list[str]:
    minutes = sum(scores["training_seconds"] for scores in found.values()) / 60
    return [
        "# Results",
        "",
        "Which parts of the recipe earn their place, measured on tokens that anyone can build.",
        "Everything here is written by",
        "",
        "```bash",
        "make results",
        "```",
        "",
        "from run directories (`python scripts/results.py list` prints each command line; stopped,",
        f"it goes on where it was). {len(found)} of {len(RUNS)} runs, {minutes:.0f} minutes of",
        "training on one CPU core each. Cosines are per token, raw, on 256 held-out images. *mean*",
        "is one network evaluation at t = 0, the posterior mean; *euler-4* and *heun-10* draw",
        "samples (4 and 19 evaluations). Numbers are means over seeds, with half their range in",
        "brackets. Networks are small and runs short: read differences, not levels.",
        "",
    ]


def _parts(found: Found, testbed: str) -> list[str]:
    rows = []
    for recipe in (DEFAULT, *PARTS):
        scored = _of(found, recipe, testbed)
        if not scored:
            continue
        own = recipe.overrides.split()
        rows.append(
            [
                recipe.what,
                " ".join(f"`{word}`" for word in own) or "-",
                *(_over_seeds([_estimator(s, n) for s in scored]) for n in (*FEW, "heun-10")),
                _over_seeds([_estimator(s, "heun-10", "frechet_token") for s in scored]),
                str(len(scored)),
            ]
        )
    if not rows:
        return []
    heads = ["part", "overrides", "mean", "euler-4", "heun-10", "token Frechet of heun-10", "seeds"]
    return [f"## Parts of the recipe on {testbed}", "", *_table(heads, rows)]


def _seeds(found: Found) -> list[str]:
    """Return the table of the seeds' recipes, corrected, beside ours."""
    rows = []
    for recipe in (DEFAULT, *SEED_RECIPES):
        scored = _of(found, recipe, "demo")
        if scored:
            best = [max(block["cosine"] for block in s["estimators"].values()) for s in scored]
            seconds = mean(s["training_seconds"] for s in scored)
            cells = [f"{mean(1 - value for value in best):.4f}", f"{seconds:.0f} s"]
            rows.append([recipe.what, _over_seeds(list(best)), *cells, str(len(scored))])
    if len(rows) < 2:
        return []
    return [
        "## Against the seeds' recipes",
        "",
        "Their architecture, output, schedule and raw targets at the testbed's size, with our",
        "correct sampling, the same steps and images, and our learning rate (theirs, 1e-4, is for",
        "long runs). Best estimator of each.",
        "",
        *_table(["recipe", "cosine", "1 - cosine", "training", "seeds"], rows),
    ]


def _widths(found: Found) -> list[str]:
    by_key = {recipe.key: recipe for recipe in (*WIDTHS, *PARTS, DEFAULT)}
    rows = []
    for width in (64, 128, 256):
        row = [str(width)]
        for output, same in (("sample", "default"), ("velocity", "velocity")):
            recipe = by_key[same if width == 128 else f"width_{width}_{output}"]
            scored = _of(found, recipe, "demo")
            row += [_over_seeds([_estimator(s, n) for s in scored]) for n in ("mean", "heun-10")]
        rows.append(row)
    heads = ["width", "sample: mean", "heun-10", "velocity: mean", "heun-10"]
    return [
        "## Width of the network",
        "",
        "The target has 128 channels. A velocity output must carry the noise through the network's",
        "width, a sample output need not.",
        "",
        *_table(heads, rows),
    ]


def _ambiguous(found: Found) -> list[str]:
    scored = _of(found, DEFAULT, "ambiguous")
    if not scored:
        return []
    rows = []
    for name in scored[0]["coverage"]:
        blocks = [s["coverage"][name] for s in scored]
        modes = len(blocks[0]["weights"])
        rows.append(
            [
                name.replace("optimum", "exact"),
                f"{min(b['covered'] for b in blocks)} of {modes}",
                f"{max(b['weight_error'] for b in blocks):.3f}",
                f"{mean(b['spread'] for b in blocks):.2f}",
                f"{mean(b['agreement'] for b in blocks):.3f}",
            ]
        )
    heads = ["tokens of", "modes covered", "largest weight error", "spread", "agreement"]
    return [
        "## What regression can't do",
        "",
        "`ambiguous` tokens have three right answers a condition, with weights 0.5, 0.3 and 0.2. A",
        "spread of 1 and an agreement of 1 are a correct sample's; the worst seed counts.",
        "",
        *_table(heads, rows),
    ]


def _masked(found: Found) -> list[str]:
    scored = _of(found, DEFAULT, "demo_masked")
    if not scored:
        return []
    rows = []
    for name in ("mean", "euler-4", "heun-10"):
        rows.append([name, *_masked_cells([s["estimators"][name] for s in scored])])
    for name in ("regression", "ridge", "mean_token"):
        rows.append([name, *_masked_cells([s["baselines"][name] for s in scored])])
    floor = mean(s["frechet_floor"]["frechet_token"] for s in scored)
    rows.append(["two halves of the true images", "-", f"{floor:.3f}"])
    return [
        "On `demo_masked` the condition shows the left half of a scene; the rest must be guessed.",
        f"Frechet distances are over {256 * 256:,} tokens.",
        "",
        *_table(["tokens of", "cosine", "token Frechet"], rows),
    ]


def _masked_cells(blocks: list[dict[str, Any]]) -> list[str]:
    cosine = _over_seeds([block["cosine"] for block in blocks])
    return [cosine, f"{mean(block['frechet_token'] for block in blocks):.3f}"]


def _curve(found: Found) -> list[str]:
    lines: list[str] = []
    for testbed in DEFAULT.testbeds:
        scored = _of(found, DEFAULT, testbed)
        points: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for scores in scored:
            for point in scores["nfe_curve"]:
                points.setdefault((point["solver"], point["nfe"]), []).append(point)
        rows = [
            [
                f"{solver}, {nfe}",
                _over_seeds([point["cosine"] for point in both]),
                _over_seeds([point["frechet"] for point in both]),
            ]
            for (solver, nfe), both in sorted(points.items(), key=lambda item: item[0][1])
        ]
        if rows:
            lines += [f"### {testbed}", "", *_table(["solver, NFE", "cosine", "Frechet"], rows)]
    if not lines:
        return []
    return ["## Few steps", "", "Frechet distances are of image means.", "", *lines]


def _honesty(found: Found) -> list[str]:
    rows = []
    for testbed in DEFAULT.testbeds:
        for scores in _of(found, DEFAULT, testbed)[:1]:
            swapped = scores["swapped"]
            cells = [scores["estimators"]["mean"]["cosine"], swapped["mean"], swapped["heun-10"]]
            rows.append([testbed, *(f"{value:.4f}" for value in (*cells, swapped["random_pairs"]))])
    if not rows:
        return []
    heads = ["testbed", "mean, own condition", "mean, swapped", "heun-10, swapped", "random pairs"]
    return [
        "## Honesty",
        "",
        "With the condition of another image, samples must score what two different true images",
        "score. A run on shuffled pairs scores the mean token (`tests/test_shuffled_pairs.py`),",
        "and no scan of a validation scene is in a training scene (`tests/test_scenes.py`).",
        "",
        *_table(heads, rows),
    ]


def _claims(found: Found) -> list[str]:
    """Return each target with the figure that it is held against."""
    rows: list[list[str]] = []

    def claim(what: str, target: str, value: float | None, met: Callable[[float], bool]) -> None:
        if value is not None:
            rows.append([what, target, f"{value:.4f}", "met" if met(value) else "MISSED"])

    for testbed in ("demo", "linear_gaussian"):
        low = _peer(found, testbed)
        what = (
            f"{testbed}: best of at most 4 NFE minus the noise-free transformer, lower end of 95 %"
        )
        claim(what, ">= -0.002", low, lambda value: value >= -0.002)
    scored = _of(found, DEFAULT, "linear_gaussian")
    if scored:
        exact = mean(s["optimum"]["mean"]["cosine"] for s in scored)
        sampler = mean(s["optimum"]["sample"]["cosine"] for s in scored)
        own = mean(s["estimators"]["mean"]["cosine"] for s in scored)
        drawn = mean(s["estimators"]["heun-10"]["cosine"] for s in scored)
        floor = mean(s["frechet_floor"]["frechet_token"] for s in scored)
        apart = mean(s["estimators"]["heun-10"]["frechet_token"] for s in scored)
        claim("mean's cosine over the exact mean's", ">= 0.995", own / exact, lambda v: v >= 0.995)
        claim(
            "sample's cosine over the exact sampler's",
            "within 2 %",
            drawn / sampler,
            lambda v: abs(v - 1) <= 0.02,
        )
        claim("samples' Frechet over the floor's", "<= 1.2", apart / floor, lambda v: v <= 1.2)
    ours = _error(found, DEFAULT)
    for recipe in SEED_RECIPES:
        theirs = _error(found, recipe)
        if ours and theirs:
            what = f"1 - cosine over that of {recipe.key}"
            claim(what, "<= 0.25", ours / theirs, lambda value: value <= 0.25)
    covered = [s["coverage"]["heun-10"] for s in _of(found, DEFAULT, "ambiguous")]
    if covered:
        worst = max(block["weight_error"] for block in covered)
        claim("ambiguous: largest weight error of heun-10", "<= 0.05", worst, lambda v: v <= 0.05)
        share = min(block["covered"] / len(block["weights"]) for block in covered)
        claim("ambiguous: share of modes covered", "1", share, lambda value: value == 1)
    masked = _of(found, DEFAULT, "demo_masked")
    if masked:
        ratio = mean(
            s["estimators"]["heun-10"]["frechet_token"] / s["estimators"]["mean"]["frechet_token"]
            for s in masked
        )
        what = "demo_masked: token Frechet of samples over the mean's"
        claim(what, "<= 0.333", ratio, lambda value: value <= 1 / 3)
    for key, worse in (("cosine", -1), ("frechet", 1)):
        change = _few_steps(found, key, worse)
        what = f"demo: {key} of euler-4 worse than that of euler-50 by a share of"
        claim(what, "<= 0.02", change, lambda value: value <= 0.02)
    if not rows:
        return []
    heads = ["claim", "target", "measured", ""]
    return ["## Claims and targets", "", *_table(heads, rows)]


def _peer(found: Found, testbed: str) -> float | None:
    """Return the lower end of the 95 % interval of the difference to the noise-free transformer.

    Student's t over the seeds' mean differences, each of which is over the same images; the best
    few-step estimator is chosen on the mean over seeds.
    """
    scored = _of(found, DEFAULT, testbed)
    if len(scored) < 2:
        return None
    differences = {
        name: [s["against"][name]["regression"]["difference"] for s in scored] for name in FEW
    }
    best = max(differences.values(), key=mean)
    count = len(best)
    spread = math.sqrt(sum((value - mean(best)) ** 2 for value in best) / (count - 1))
    return mean(best) - T_95[count - 1] * spread / math.sqrt(count)


def _error(found: Found, recipe: Recipe) -> float | None:
    scored = _of(found, recipe, "demo")
    if not scored:
        return None
    return mean(1 - max(block["cosine"] for block in s["estimators"].values()) for s in scored)


def _few_steps(found: Found, key: str, worse: int) -> float | None:
    """Return by what share 4 Euler steps are worse than 50."""
    shares = []
    for scores in _of(found, DEFAULT, "demo"):
        points = {(p["solver"], p["nfe"]): p[key] for p in scores["nfe_curve"]}
        few, many = points[("euler", 4)], points[("euler", 50)]
        shares.append(worse * (few - many) / many)
    return mean(shares) if shares else None


assert len({recipe.key for recipe in RECIPES}) == len(RECIPES)
