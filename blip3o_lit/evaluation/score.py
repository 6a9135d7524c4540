"""Score a translator on one split, beside baselines, with the same images and noise for all.

Shape suffixes: B images, N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_lit.base.progress import Report
from blip3o_lit.checkpoints.load import Loaded, solver_from_label
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import BASELINE_SETS, EvaluateConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.evaluation.baselines import BaselineFits
from blip3o_lit.evaluation.drawings import Drawings, row_images
from blip3o_lit.evaluation.estimators import (
    Batch,
    Estimator,
    exact_estimators,
    generated,
    known_problem,
)
from blip3o_lit.evaluation.examples import examples, worst
from blip3o_lit.evaluation.hidden_half import shows_scenes
from blip3o_lit.evaluation.image_text import ImageText
from blip3o_lit.evaluation.probes import samples, swapped, time_bins
from blip3o_lit.evaluation.solver_fits import fit_solvers, missing_budgets
from blip3o_lit.evaluation.tally import Reference, Tally, feed
from blip3o_lit.evaluation.verdict import check_finite, standing, verdict, verdict_note
from blip3o_lit.metrics.paired import compare
from blip3o_lit.report.record import FORMAT
from blip3o_lit.testbeds.ambiguous import coverage
from blip3o_lit.tokens.reading.ahead import fetched_ahead
from blip3o_lit.tokens.reading.reader import TokenReader

COVERAGE_IMAGES = 1024
"""Images that mode coverage is counted on, at most."""
CURVE = ("cosine", "cosine_centred", "mse", "frechet", "norm_ratio", "seconds_per_image")
OWN = "generated"

Tallies = dict[str, Tally]


class Scorer:
    """Scores `loaded` on `held`, beside baselines of `train`, which `folder` keeps.

    `rival`, another translator of the same tokens, is compared with it image by image.
    """

    def __init__(
        self,
        loaded: Loaded,
        held: TokenReader,
        train: TokenReader | None,
        config: EvaluateConfig,
        folder: Path,
        report: Report,
        rival: Loaded | None = None,
    ) -> None:
        self.loaded, self.held, self.train, self.rival = loaded, held, train, rival
        self.config, self.report = config, report
        self.shape = loaded.shape.target
        self.images = min(config.images or len(held), len(held))
        self.solver_images = min(config.solver_images or self.images, self.images)
        self.curve_images = min(config.curve_images, len(held))
        labels = [*config.solvers, *config.curve]
        for one in (loaded, rival) if rival is not None else (loaded,):
            fit_solvers(one, train, missing_budgets(one, labels), config.seed, report)
        self.device = next(loaded.translator.network.parameters()).device
        if train is None and BASELINE_SETS[config.baselines]:
            raise UserError(
                f"{held.store.address} has no train split to fit baselines on: set baselines=none"
            )
        self.fits = None
        self.mean_ND = loaded.translator.target_standardizer.mean_NC
        if train is not None:
            self.fits = BaselineFits(train, loaded, config, folder, report)
            self.mean_ND = self.fits.mean_token()
        self.image_text = ImageText(held, train, self.device)
        # Its images are among those that the solvers draw samples of: all have the same ones.
        masked = loaded.config.data.name == "demo_masked" and shows_scenes(held)
        few = self.solver_images
        self.drawings = Drawings(held, train, config, few, folder, report, masked)

    def run(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`, which has finite numbers only."""
        estimators = self._estimators(self.loaded)
        baselines = self._baselines()
        problem = known_problem(self.held)
        optima = self._tallies(exact_estimators(problem) if problem else {})
        rivals = self._estimators(self.rival) if self.rival else {}
        headline = next(iter(estimators))
        reference, few = self._main_pass(headline, estimators, baselines, optima, rivals)
        cosine_B = estimators[headline].image_cosine()
        report: dict[str, Any] = {
            **self._facts(),
            "headline": headline,
            "estimators": self._scores(estimators, reference, few),
            "baselines": self._scores(baselines, reference),
            "frechet_floor": reference.floor(),
            "retrieval": self.image_text.retrieval(),
            "zero_shot": self.image_text.zero_shot(),
            "worst": worst(self.held, cosine_B),
            "examples": self._examples(cosine_B),
            "nfe_curve": self._curve(),
            "time_bins": self._time_bins(),
            "samples": self._samples(),
            "drawings": {**self.drawings.facts(), **self._rows(estimators, cosine_B)},
            "swapped": self._swapped(estimators),
            "against": {
                name: {key: _difference(tally, other) for key, other in baselines.items()}
                for name, tally in estimators.items()
            },
            **estimators[headline].maps,
        }
        records = self.loaded.translator.fitted.records
        if records:
            report["fitted_solvers"] = {str(nfe): records[nfe] for nfe in sorted(records)}
        for name, tally in estimators.items():
            report["estimators"][name]["nfe"] = tally.nfe
        if problem is not None:
            report["optimum"] = self._scores(optima, reference)
            report["optimum"]["mean"]["expected_mse"] = problem.token_error()
            report["optimum"]["sample"]["expected_mse"] = 2 * problem.token_error()
        if problem is not None and len(problem.weights_K) > 1:
            report["coverage"] = self._coverage({**estimators, **baselines}, optima)
        if self.rival:
            both = {name: rivals[name] for name in estimators if name in rivals}
            report["paired"] = {
                "checkpoint": self.rival.hash,
                "run": self.rival.folder.name,
                "cosine": {name: _difference(estimators[name], both[name]) for name in both},
            }
        report["verdict"] = verdict(report["estimators"][headline]["cosine"])
        report["standing"] = standing(report)
        report["verdict_note"] = verdict_note(report)
        check_finite(report)
        return report

    def _estimators(self, loaded: Loaded) -> Tallies:
        """Return a tally for the posterior mean, where there is one, and for each solver."""
        solvers = [solver_from_label(label) for label in self.config.solvers]
        if loaded.config.flow.has_mean:
            solvers = [SolverConfig(), *solvers]
        if not solvers:
            raise UserError("this flow has no posterior mean at t = 0: name a solver in solvers=[]")
        seed = self.config.seed
        return self._tallies({s.label: generated(loaded, s, seed) for s in solvers})

    def _baselines(self) -> Tallies:
        if self.fits is None:
            return {}
        names = BASELINE_SETS[self.config.baselines]
        return self._tallies({name: self.fits.estimator(name) for name in names})

    def _tallies(self, estimators: dict[str, Estimator], breadth: bool = True) -> Tallies:
        return {
            name: Tally(estimate, self.mean_ND, self.shape, self.device, breadth)
            for name, estimate in estimators.items()
        }

    def _batches(self, images: int, what: str, first: int | None = None) -> Iterator[Batch]:
        """Yield the first `images` images, and report when each batch is done.

        A batch ends where the `first` images do.
        """
        self.report(what, 0, images)
        size, cut = self.config.batch_size, min(images, images if first is None else first)
        bounds = [*range(0, cut, size), *range(cut, images, size), images]
        batches = [np.arange(start, end) for start, end in pairwise(bounds)]
        for ids in fetched_ahead(self.held, batches, batches):
            yield self.read(ids)
            self.report(what, int(ids[-1]) + 1, images)

    def read(self, ids: np.ndarray) -> Batch:
        batch = self.held.read(ids)
        condition, target = batch["condition"].to(self.device), batch["target"].to(self.device)
        return condition, target, torch.from_numpy(ids)

    def _main_pass(
        self,
        headline: str,
        estimators: Tallies,
        baselines: Tallies,
        optima: Tallies,
        rivals: Tallies,
    ) -> tuple[Reference, Reference]:
        """Feed the images to every tally, and to the checks of what tokens mean.

        Solvers take `solver_images` of them, all others each one. Returns the true tokens of all
        images, and of those of the solvers.
        """
        every, solvers = {}, {}
        for prefix, tallies in (("", estimators), ("vs ", rivals)):
            for name, tally in tallies.items():
                (every if name == headline else solvers)[prefix + name] = tally
        every |= baselines | {f"optimum {name}": tally for name, tally in optima.items()}
        reference, few = (Reference(self.shape, self.device) for _ in range(2))
        for batch in self._batches(self.images, "scoring", self.solver_images):
            _, true_BND, sample_B = batch
            predictions = feed(every, reference, batch)
            samples_of = {}
            if solvers and int(sample_B[0]) < self.solver_images:
                samples_of = feed(solvers, few, batch)
            own = estimators.keys() | baselines.keys()
            drawn = {name: x for name, x in (predictions | samples_of).items() if name in own}
            self.drawings.add(drawn, true_BND, sample_B)
            tokens = {OWN: predictions[headline]}
            tokens |= {name: predictions[name] for name in baselines}
            tokens["true"] = true_BND
            tokens["mean_token"] = self.mean_ND.expand(len(sample_B), -1, -1)
            self.image_text.add(tokens, sample_B.numpy())
        return reference, few

    def _facts(self) -> dict[str, Any]:
        mode, facts = self.held.mode, self.loaded.facts
        return {
            "format": FORMAT,
            "split": self.held.split,
            "images": self.images,
            "mode": mode.name,
            "projected": mode.projected,
            "tokens": self.held.store.index.hash,
            "trained_on_these": (
                self.train is not None and self.train.content_hash == facts["tokens"]["hash"]
            ),
            "checkpoint": self.loaded.hash,
            "step": facts["step"],
            "seed": self.config.seed,
        }

    def _scores(
        self, tallies: Tallies, reference: Reference, few: Reference | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the scores of each; those of fewer images beside the floor of these images."""
        scores: dict[str, dict[str, Any]] = {}
        for name, tally in tallies.items():
            scores[name] = {"split": self.held.split}
            if few is None or tally.images == self.images:
                scores[name] |= tally.result(reference)
            else:
                scores[name] |= tally.result(few)
                scores[name] |= {f"floor_{key}": value for key, value in few.floor().items()}
            scores[name] |= self.drawings.scores(name)
        return scores

    def _examples(self, cosine_B: np.ndarray) -> dict[str, Any]:
        # Without CLS the tower's own read-out is a mean of patches, which it was not trained for.
        recall = self.image_text.recall
        read_out = "tower" if self.shape.cls or "fitted" not in recall else "fitted"
        sources = {
            name: recall[read_out][name] for name in (OWN, "true") if name in recall[read_out]
        }
        return examples(self.held, cosine_B, sources, self.config.pictures)

    def _rows(self, tallies: Tallies, cosine_B: np.ndarray) -> dict[str, Any]:
        """Return pictures of the best, median and worst images, with two samples of each."""
        if self.drawings.drawer is None:
            return {}
        places = row_images(cosine_B)
        ids = np.array([number for numbers in places.values() for number in numbers])
        kinds = [kind for kind, numbers in places.items() for _ in numbers]
        titles = [f"{kind}: {key}" for kind, key in zip(kinds, self.held.keys(ids))]
        headline, config = next(iter(tallies)), self.config
        columns = {headline: tallies[headline].predict}
        for label in config.solvers[:1]:
            solver = solver_from_label(label)
            for number in range(2):
                estimate = generated(self.loaded, solver, config.seed + number)
                columns[f"sample {number + 1}"] = estimate
        return {"rows": self.drawings.rows(self.read(ids), titles, columns)}

    def _curve(self) -> list[dict[str, Any]]:
        solvers = [solver_from_label(label) for label in self.config.curve]
        estimators = {s.label: generated(self.loaded, s, self.config.seed) for s in solvers}
        tallies = self._tallies(estimators, breadth=False)
        if not tallies:
            return []
        reference = Reference(self.shape, self.device)
        for batch in self._batches(self.curve_images, "curve"):
            feed(tallies, reference, batch)
        points = []
        for solver in solvers:
            tally = tallies[solver.label]
            point = {"solver": solver.name, "nfe": tally.nfe, "images": self.curve_images}
            scores = tally.result(reference)
            points.append(point | {name: scores[name] for name in CURVE if name in scores})
        return points

    def _time_bins(self) -> list[dict[str, Any]]:
        batches = self._batches(self.curve_images, "loss by time")
        return time_bins(self.loaded.translator, batches, self.config.seed)

    def _samples(self) -> dict[str, Any]:
        count, config = self.config.samples, self.config
        if count < 2 or not config.solvers or not self.loaded.config.flow.has_mean:
            return {}
        solver = solver_from_label(config.solvers[0])
        images = min(config.sample_images, len(self.held))
        draws = [generated(self.loaded, solver, config.seed + number) for number in range(count)]
        mean = generated(self.loaded, SolverConfig(), config.seed)
        watch = self.drawings.add_draws
        scores = samples(draws, mean, self._batches(images, "samples"), self.device, watch)
        return {"solver": solver.label, "images": images, **scores}

    def _swapped(self, tallies: Tallies) -> dict[str, Any]:
        if self.curve_images < 2:
            return {}
        estimators = {name: tally.predict for name, tally in tallies.items()}
        return swapped(estimators, self._batches(self.curve_images, "swapped conditions"))

    def _coverage(self, tallies: Tallies, optima: Tallies) -> dict[str, Any]:
        condition, _, sample_B = self.read(np.arange(min(COVERAGE_IMAGES, len(self.held))))
        tallies = tallies | {f"optimum {name}": tally for name, tally in optima.items()}
        shares = {}
        for name, tally in tallies.items():
            tokens_BND, _ = tally.predict(condition, sample_B)
            path = self.held.store.path
            shares[name] = coverage(path, condition.cpu(), tokens_BND.cpu())
        return shares


def _difference(first: Tally, second: Tally) -> dict[str, Any]:
    """Compare two on the images that both have."""
    images = min(first.images, second.images)
    return compare(first.image_cosine()[:images], second.image_cosine()[:images])
