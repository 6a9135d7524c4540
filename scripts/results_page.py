"""docs/results.md from evaluations: tables of recipes, and each claim beside its target."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from recipes import (
    BASE,
    DEFAULT,
    GUESSING,
    ON,
    PARTS,
    PLAIN,
    RUNS,
    SEED_RECIPES,
    Recipe,
)
from results_claims import claims
from results_found import (
    Found,
    estimator,
    gains,
    interval,
    over_seeds,
    scores_of,
    table,
)
from results_masked import hidden_halves, larger, masked
from results_rates import rates

SMALLEST = {"mean": 0.001, "samples": 0.1}
"""Gains below this count as none, however sure: of cosine, and of log Frechet distance."""


def write_page(path: Path, found: Found) -> None:
    """Write the page; recipes and seeds that are missing are said to be."""
    parts = [
        *_head(found),
        *claims(found),
        *_choices(found),
        *(line for testbed in GUESSING for line in _parts(found, testbed)),
        *_seeds(found),
        *rates(found),
        *_ambiguous(found),
        *masked(found),
        *larger(found),
        *hidden_halves(found),
        *_curve(found),
        *_honesty(found),
    ]
    path.write_text("\n".join(parts) + "\n", "utf-8")


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
        "which goes on where it was stopped (`python scripts/results.py list` prints each command",
        f"line; records are in `docs/results`). {len(found)} of {len(RUNS)} runs,",
        f"{minutes:.0f} CPU-minutes of training. Cosines are per token, raw, on",
        "256 held-out images. *mean* is one network evaluation at t = 0; *ab2-4*, *ab2-8*,",
        "*fitted-4* and *heun-10* draw samples (4, 8, 4 and 19 evaluations). Numbers are means",
        "over seeds, with half their range in brackets. Networks are small and runs short: read",
        "differences, not levels. Parts that were settled before are in [Parts](parts.md).",
        "",
    ]


def verdict(found: Found, recipe: Recipe, testbed: str, name: str) -> str:
    """Say whether a part is better or worse than the plain recipe: its 95 % interval over seeds."""
    found_gains = gains(found, recipe, BASE, testbed, name)
    if not found_gains:
        return "-"
    bounds, middle = interval(found_gains), mean(found_gains)
    sure = bounds is not None and (bounds[0] > 0 or bounds[1] < 0)
    if abs(middle) < SMALLEST["mean" if name == "mean" else "samples"]:
        return "same"
    return ("better" if middle > 0 else "worse") + ("" if sure else "?")


def _choices(found: Found) -> list[str]:
    """Return what the parts mean for somebody who chooses options."""
    rows = []
    for recipe in PARTS:
        verdicts = [
            f"{verdict(found, recipe, testbed, 'mean')}, {verdict(found, recipe, testbed, 'ab2-8')}"
            if testbed in recipe.testbeds
            else ""
            for testbed in GUESSING
        ]
        if any("-, -" not in verdict and verdict for verdict in verdicts):
            words = " ".join(f"`{word}`" for word in recipe.overrides.split() if word != PLAIN)
            rows.append([recipe.what, words, *verdicts])
    if not rows:
        return []
    return [
        "## Choosing options",
        "",
        f"Each part against the plain recipe, the squared error alone (`{PLAIN}`, in every",
        "line but the cosine terms'): its mean estimate in cosine, then its samples (ab2-8) in",
        "token Frechet distance. *same*: they differ by less than 0.001, or by less than a tenth.",
        "A question mark stands where the 95 % interval over seeds (Student's t of the gains, seed",
        "by seed) holds 0, or where one seed alone is there. A part becomes the default only where",
        "it gains on two testbeds, at the demo's size too ([tried](tried.md)): so did the cosine",
        "term. It moves the minimiser from the posterior mean towards the best cosine; where",
        "closed forms have to hold (`linear_gaussian`, `ambiguous`) it is left out.",
        "",
        *table(["part", "overrides", *GUESSING], rows),
    ]


def _parts(found: Found, testbed: str) -> list[str]:
    rows = []
    for recipe in (BASE, *PARTS):
        scored = scores_of(found, recipe, testbed)
        if not scored:
            continue
        rows.append(
            [
                recipe.what,
                *(over_seeds([estimator(s, n) for s in scored]) for n in ("mean", "ab2-8")),
                over_seeds([estimator(s, "ab2-8", "frechet_token") for s in scored]),
                f"{mean(s['training_seconds'] for s in scored):.0f} s",
                str(len(scored)),
            ]
        )
    if not rows:
        return []
    heads = ["part", "mean", "ab2-8", "token Frechet of ab2-8", "training", "seeds"]
    return [f"## Parts of the recipe on {testbed}", "", *table(heads, rows)]


def _seeds(found: Found) -> list[str]:
    """Return the table of the seeds' recipes, corrected, beside ours."""
    rows = []
    for recipe in (DEFAULT, BASE, *SEED_RECIPES):
        scored = scores_of(found, recipe, "demo")
        if scored:
            best = [max(block["cosine"] for block in s["estimators"].values()) for s in scored]
            seconds = mean(s["training_seconds"] for s in scored)
            cells = [f"{mean(1 - value for value in best):.4f}", f"{seconds:.0f} s"]
            rows.append([recipe.what, over_seeds(list(best)), *cells, str(len(scored))])
    if len(rows) < 2:
        return []
    return [
        "## Against the seeds' recipes",
        "",
        "Their architecture, output, schedule and raw targets at the testbed's size, with our",
        "correct sampling, the same steps and images, and our learning rate (theirs, 1e-4, is for",
        "long runs). Best estimator of each.",
        "",
        *table(["recipe", "cosine", "1 - cosine", "training", "seeds"], rows),
    ]


def _ambiguous(found: Found) -> list[str]:
    scored = scores_of(found, BASE, "ambiguous")
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
        *table(heads, rows),
    ]


def _curve(found: Found) -> list[str]:
    lines: list[str] = []
    for testbed, recipe in ON.items():
        scored = scores_of(found, recipe, testbed)
        points: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for scores in scored:
            for point in scores["nfe_curve"]:
                points.setdefault((point["solver"], point["nfe"]), []).append(point)
        rows = [
            [
                f"{solver}, {nfe}",
                over_seeds([point["cosine"] for point in both]),
                over_seeds([point["frechet"] for point in both]),
            ]
            for (solver, nfe), both in sorted(points.items(), key=lambda item: item[0][1])
        ]
        if rows:
            lines += [f"### {testbed}", "", *table(["solver, NFE", "cosine", "Frechet"], rows)]
    if not lines:
        return []
    return ["## Few steps", "", "Frechet distances are of image means.", "", *lines]


def _honesty(found: Found) -> list[str]:
    rows = []
    for testbed, recipe in ON.items():
        for scores in scores_of(found, recipe, testbed)[:1]:
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
        "score. A run on shuffled pairs scores the mean token",
        "(`tests/evaluation/test_shuffled_pairs.py`), and no scan of a validation scene is in a",
        "training scene (`tests/towers/test_scenes.py`).",
        "",
        *table(heads, rows),
    ]
