"""Which held-out images the report draws, a row per image, and whose tokens beside the true ones.

Shape suffixes: B images.
"""

from typing import Any

import numpy as np

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.solver import solver_from_label
from blip3o_lit.evaluation.drawings import Drawings
from blip3o_lit.evaluation.estimators import Estimator, generated
from blip3o_lit.evaluation.examples import ranked
from blip3o_lit.evaluation.held_out import HeldOut
from blip3o_lit.evaluation.main_pass import Tallies
from blip3o_lit.tokens.reading.order import evenly

RANKED, RANKED_SAMPLES = 2, 2
"""Images of each kind (best, median, worst), and samples of each."""
CAPTIONS, CAPTION_SAMPLES = 6, 3
"""Captions of a run on words, and samples of each."""


def ranked_rows(
    drawings: Drawings,
    held: HeldOut,
    loaded: Loaded,
    config: EvaluateConfig,
    tallies: Tallies,
    cosine_B: np.ndarray,
) -> list[dict[str, Any]]:
    """Draw the best, median and worst images: the headline's tokens, and samples."""
    by_kind = ranked(cosine_B, RANKED)
    ids = np.concatenate(list(by_kind.values()))
    kinds = [kind for kind, numbers in by_kind.items() for _ in numbers]
    titles = [f"{kind}: {key}" for kind, key in zip(kinds, held.reader.keys(ids))]
    headline = next(iter(tallies))
    columns = {headline: tallies[headline].predict}
    for label in config.solvers[:1]:
        columns |= _samples(loaded, label, RANKED_SAMPLES, config.seed, "sample")
    return drawings.rows(held.read(ids), titles, columns)


def caption_rows(
    drawings: Drawings,
    held: HeldOut,
    loaded: Loaded,
    config: EvaluateConfig,
    tallies: Tallies,
    images: int,
) -> list[dict[str, Any]]:
    """Draw captions, evenly spaced over `images`: the regression's tokens, and samples.

    Samples are of the headline's solver, or of the first solver where that draws none.
    """
    ids, headline = evenly(images, CAPTIONS), next(iter(tallies))
    columns = {name: tallies[name].predict for name in ("regression",) if name in tallies}
    for label in [headline] if headline != "mean" else config.solvers[:1]:
        columns |= _samples(loaded, label, CAPTION_SAMPLES, config.seed, f"{label}, sample")
    return drawings.rows(held.read(ids), held.reader.captions(ids), columns)


def _samples(loaded: Loaded, label: str, count: int, seed: int, title: str) -> dict[str, Estimator]:
    """Return samples of a solver by title and number from 1, each with noise of its own."""
    solver = solver_from_label(label)
    return {
        f"{title} {number + 1}": generated(loaded, solver, seed + number) for number in range(count)
    }
