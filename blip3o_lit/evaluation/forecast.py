"""How long the phases of an evaluation will take on this machine, from one measured batch."""

import time

import numpy as np

from blip3o_lit.config.evaluate import BASELINE_SETS
from blip3o_lit.config.solver import SolverConfig, solver_from_label
from blip3o_lit.evaluation.estimators import generated
from blip3o_lit.evaluation.probes import BINS
from blip3o_lit.evaluation.score import Scorer

TRAINING = 3
"""A training step's passes in forward passes."""


def phase_seconds(scorer: Scorer) -> dict[str, float]:
    """Return about how long each phase takes; metrics and small fits are left out.

    The second of two batches is timed. Evaluations of a solver are counted on a single image.
    """
    config, loaded = scorer.config, scorer.loaded
    solvers = {*config.solvers, *config.curve}
    labels = {label: solver_from_label(label) for label in sorted(solvers)}
    one = scorer.held_out.read(np.arange(1))
    nfe = {
        label: generated(loaded, solver, config.seed)(one[0], one[2])[1]
        for label, solver in labels.items()
    }
    first = SolverConfig() if loaded.config.flow.has_mean else labels[config.solvers[0]]
    estimate = generated(loaded, first, config.seed)
    condition, _, sample_B = scorer.held_out.read(np.arange(min(config.batch_size, scorer.images)))
    seconds, evaluations = 0.0, 1
    for _ in range(2):
        start = time.perf_counter()
        tokens_BND, evaluations = estimate(condition, sample_B)
        tokens_BND.sum().item()  # waits for a GPU
        seconds = time.perf_counter() - start
    image = seconds / len(sample_B) / evaluations

    # The first evaluation of each is the mean's, where an output at t = 0 sees no noise.
    shared = int(loaded.translator.objective.blind_at_zero)
    alone = {label: count - shared for label, count in nfe.items()}
    drawn = sum(alone[label] for label in config.solvers)
    further = [label for label in config.curve if label not in config.solvers]
    scoring = scorer.images + scorer.solver_images * drawn
    scoring += scorer.curve_images * sum(alone[label] for label in further)
    if config.solvers and config.samples > 1:
        scoring += config.sample_images * (config.samples - 1) * alone[config.solvers[0]]
    phases = {
        "scoring": scoring,
        "swapped conditions": scorer.curve_images * (1 + drawn),
        "loss by time": scorer.curve_images * BINS,
    }
    fits = scorer.fits
    asked = fits is not None and "regression" in BASELINE_SETS[config.baselines]
    if fits is not None and asked and not fits.file("regression").is_file():
        steps = fits.steps * loaded.config.batch_size * TRAINING
        phases = {"noise-free transformer": steps} | phases
    return {name: count * image for name, count in phases.items()}
