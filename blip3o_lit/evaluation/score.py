"""Score a translator on one split, beside baselines, with the same images and noise for all.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width,
K samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.progress import Report
from blip3o_lit.checkpoints.load import Loaded, solver_from_label
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import BASELINE_SETS, EvaluateConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.evaluation.baselines import BaselineFits, fit_settings
from blip3o_lit.evaluation.estimators import (
    Estimator,
    exact_estimators,
    fitted,
    generated,
    known_problem,
)
from blip3o_lit.evaluation.examples import examples, worst
from blip3o_lit.evaluation.image_text import ImageText
from blip3o_lit.evaluation.swapped import swapped
from blip3o_lit.evaluation.tally import Reference, Tally
from blip3o_lit.evaluation.time_bins import time_bins
from blip3o_lit.evaluation.verdict import check_finite, standing, verdict, verdict_note
from blip3o_lit.metrics.calibration import Calibration
from blip3o_lit.metrics.paired import compare
from blip3o_lit.report.record import FORMAT
from blip3o_lit.testbeds.ambiguous import coverage
from blip3o_lit.tokens.reading.reader import TokenReader

COVERAGE_IMAGES = 1024
"""Images that mode coverage is counted on, at most."""
OWN = "generated"
_PAIR = 2


class Scorer:
    """Holds what all estimators of one evaluation share.

    Args:
        loaded: The translator.
        held: The images to score on.
        train: The training split, or None where the store has none.
        config: The evaluate command's settings.
        folder: Where fitted baselines are kept.
        report: Told of the progress.
        rival: Another translator of the same tokens, to be compared with image by image.
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
        self.loaded, self.held, self.config, self.report = loaded, held, config, report
        self.rival = rival
        self.translator = loaded.translator
        self.shape = loaded.shape.target
        self.device = next(self.translator.network.parameters()).device
        self.names = BASELINE_SETS[config.baselines]
        if train is None and self.names:
            raise UserError(
                f"{held.store.path} has no train split to fit baselines on: set baselines=none"
            )
        self.fits = None
        trained_on = loaded.facts["tokens"]["hash"]
        self.trained_on_these = train is not None and train.content_hash == trained_on
        if train is not None:
            settings = fit_settings(loaded, config)
            self.fits = BaselineFits(train, self.translator, settings, folder, report)
        self.mean_ND = self._mean_token()
        self.image_text = ImageText(held, train, self.device)

    def _mean_token(self) -> Tensor:
        """Return the raw mean token a position: of the training split, else of the token scales."""
        if self.fits is None:
            return self.translator.target_standardizer.mean_NC
        mean = self.fits.get("mean_token").predict(torch.empty(1, 0, device=self.device))
        return self.translator.target_standardizer.restore(mean)[0]

    def run(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`.

        Raises:
            UserError: If an estimator leaves the finite numbers.
        """
        config = self.config
        estimators = self._estimators(self.loaded)
        headline = next(iter(estimators))
        baselines = {name: self._tally(self._baseline(name)) for name in self.names}
        problem = known_problem(self.held)
        optima = {name: self._tally(law) for name, law in exact_estimators(problem).items()}
        rivals = self._estimators(self.rival) if self.rival else {}
        images = min(config.images or len(self.held), len(self.held))
        tallies = {**estimators, **baselines}
        tallies |= {f"optimum {name}": tally for name, tally in optima.items()}
        tallies |= {f"vs {name}": tally for name, tally in rivals.items()}
        sources = {headline: OWN, **{name: name for name in baselines if name != "mean_token"}}
        reference = self._pass(tallies, images, "scoring", sources)
        report: dict[str, Any] = {
            "format": FORMAT,
            "split": self.held.split,
            "images": images,
            "mode": self.held.mode.name,
            "projected": self.held.mode.projected,
            "tokens": self.held.store.index.hash,
            "trained_on_these": self.trained_on_these,
            "checkpoint": self.loaded.hash,
            "step": self.loaded.facts["step"],
            "seed": config.seed,
            "headline": headline,
            "estimators": {
                name: {"nfe": tally.nfe, **tally.result(reference)}
                for name, tally in estimators.items()
            },
            "baselines": {name: tally.result(reference) for name, tally in baselines.items()},
            "frechet_floor": reference.floor(),
            "retrieval": self.image_text.retrieval(),
            "zero_shot": self.image_text.zero_shot(),
            "worst": worst(self.held, estimators[headline].image_cosine()),
            "examples": self._examples(estimators[headline]),
            "nfe_curve": self._curve(),
            "time_bins": self._time_bins(),
            "samples": self._samples(),
            "swapped": self._swapped(estimators),
            "against": {
                name: self._against(tally, baselines) for name, tally in estimators.items()
            },
        }
        groups = [report["estimators"], report["baselines"]]
        if problem is not None:
            expected = problem.token_error()
            report["optimum"] = {
                name: {**tally.result(reference), "expected_mse": (1 + number) * expected}
                for number, (name, tally) in enumerate(optima.items())
            }
            groups.append(report["optimum"])
            if len(problem.weights_K) > 1:
                exact = {f"optimum {name}": law for name, law in optima.items()}
                report["coverage"] = self._coverage({**estimators, **baselines, **exact})
        if self.rival:
            report["paired"] = self._paired(estimators, rivals)
        for name in ("position_cosine", "position_std"):
            report[name] = report["estimators"][headline][name]
        for block in (block for group in groups for block in group.values()):
            del block["position_cosine"], block["position_std"]
            block["split"] = self.held.split
        report["verdict"], report["standing"] = verdict(report), standing(report)
        report["verdict_note"] = verdict_note(report)
        check_finite(report, "")
        return report

    def _estimators(self, loaded: Loaded) -> dict[str, Tally]:
        """Return a tally for the posterior mean, where there is one, and for each solver."""
        solvers = [SolverConfig(), *map(solver_from_label, self.config.solvers)]
        if not loaded.config.flow.has_mean:
            solvers = solvers[1:]
        if not solvers:
            raise UserError("this flow has no posterior mean at t = 0: name a solver in solvers=[]")
        return {
            solver.label: self._tally(generated(loaded, solver, self.config.seed))
            for solver in solvers
        }

    def _tally(self, predict: Estimator, breadth: bool = True) -> Tally:
        return Tally(predict, self.mean_ND, self.shape, self.device, breadth)

    def _baseline(self, name: str) -> Estimator:
        """Return a baseline as an estimator, fitted if it was not."""
        assert self.fits is not None
        return fitted(self.fits.get(name), self.translator)

    def _read(self, ids: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return condition and target on the device, and the sample ids on the CPU."""
        batch = self.held.read(ids)
        condition, target = batch["condition"].to(self.device), batch["target"].to(self.device)
        return condition, target, torch.from_numpy(ids)

    def _batches(self, images: int, what: str) -> Iterator[np.ndarray]:
        """Yield the ids of the first `images` images in batches, and report when each is done."""
        self.report(what, 0, images)
        size = self.config.batch_size
        for start in range(0, images, size):
            end = min(start + size, images)
            yield np.arange(start, end)
            self.report(what, end, images)

    def _pass(
        self,
        tallies: dict[str, Tally],
        images: int,
        what: str,
        sources: dict[str, str] | None = None,
    ) -> Reference:
        """Feed the first images to every tally; `sources` names those whose meaning is tested."""
        reference = Reference(self.shape, self.device)
        for ids in self._batches(images, what):
            condition, true_BND, sample_B = self._read(ids)
            if ids[0] == 0:  # the first call pays for caches and kernels: keep it out of the times
                next(iter(tallies.values())).predict(condition[:1], sample_B[:1])
            reference.add(true_BND, sample_B)
            made = {
                name: tally.add(condition, true_BND, sample_B) for name, tally in tallies.items()
            }
            for name, tokens_BND in made.items():
                if not torch.isfinite(tokens_BND).all():
                    raise UserError(
                        f"{name} generates tokens that are not finite: use an earlier checkpoint, "
                        "or train with a lower optimizer.lr"
                    )
            if sources is not None:
                tokens = {source: made[name] for name, source in sources.items()}
                tokens["true"] = true_BND
                tokens["mean_token"] = self.mean_ND.expand(len(ids), -1, -1)
                self.image_text.add(tokens, ids)
        return reference

    def _curve(self) -> list[dict[str, Any]]:
        """Return the scores at each point of the curve over network evaluations."""
        solvers = [solver_from_label(label) for label in self.config.curve]
        tallies = {
            solver.label: self._tally(
                generated(self.loaded, solver, self.config.seed), breadth=False
            )
            for solver in solvers
        }
        if not tallies:
            return []
        images = min(self.config.curve_images, len(self.held))
        reference = self._pass(tallies, images, "curve")
        keep = ("cosine", "cosine_centred", "mse", "frechet", "norm_ratio", "seconds_per_image")
        points = []
        for solver, tally in zip(solvers, tallies.values()):
            scores = tally.result(reference)
            point = {name: scores[name] for name in keep if name in scores}
            points.append({"solver": solver.name, "nfe": tally.nfe, "images": images, **point})
        return points

    def _examples(self, headline: Tally) -> dict[str, Any]:
        """Return best, median and worst images by the headline estimator."""
        known = self.image_text.read_outs
        # Without CLS the tower's own read-out is a mean of patches, which it was not trained for.
        read_out = "tower" if self.shape.cls or "fitted" not in known else "fitted"
        answers = {
            source: self.image_text.answers[own].recall[read_out]
            for source, own in (("generated", OWN), ("true", "true"))
            if own in self.image_text.answers
        }
        return examples(self.held, headline.image_cosine(), answers, self.config.pictures)

    def _swapped(self, estimators: dict[str, Tally]) -> dict[str, Any]:
        """Return the scores with swapped conditions, on the images of the curve."""
        images = min(self.config.curve_images, len(self.held))
        if images < _PAIR:
            return {}
        laws = {name: tally.predict for name, tally in estimators.items()}
        return swapped(laws, self._read, self._batches(images, "swapped conditions"))

    @staticmethod
    def _against(estimator: Tally, baselines: dict[str, Tally]) -> dict[str, Any]:
        """Return the paired difference in cosine between an estimator and each baseline."""
        own = estimator.image_cosine()
        return {name: compare(own, tally.image_cosine()) for name, tally in baselines.items()}

    def _time_bins(self) -> list[dict[str, Any]]:
        """Return the held-out loss by time, on the images of the curve."""
        images = min(self.config.curve_images, len(self.held))
        batches = self._batches(images, "loss by time")
        return time_bins(self.translator, self._read, batches, self.config.seed)

    def _samples(self) -> dict[str, Any]:
        """Return diversity and calibration of several samples a condition, by the first solver."""
        count, config = self.config.samples, self.config
        if count < 2 or not config.solvers or not self.loaded.config.flow.has_mean:
            return {}
        solver = solver_from_label(config.solvers[0])
        images = min(config.sample_images, len(self.held))
        draws = [generated(self.loaded, solver, config.seed + draw) for draw in range(count)]
        mean = generated(self.loaded, SolverConfig(), config.seed)
        metric = Calibration(count).to(self.device)
        for ids in self._batches(images, "samples"):
            condition, true_BND, sample_B = self._read(ids)
            drawn_KBND = torch.stack([draw(condition, sample_B)[0] for draw in draws])
            metric.update(drawn_KBND, mean(condition, sample_B)[0], true_BND)
        return {"solver": solver.label, "images": images, **metric.compute()}

    def _coverage(self, tallies: dict[str, Tally]) -> dict[str, Any]:
        """Return how each one's tokens cover the modes of a known law."""
        ids = np.arange(min(COVERAGE_IMAGES, len(self.held)))
        condition, _, sample_B = self._read(ids)
        return {
            name: coverage(
                self.held.store.path, condition.cpu(), tally.predict(condition, sample_B)[0].cpu()
            )
            for name, tally in tallies.items()
        }

    def _paired(self, estimators: dict[str, Tally], rivals: dict[str, Tally]) -> dict[str, Any]:
        """Return the paired comparison of every estimator that both translators have."""
        assert self.rival is not None
        return {
            "checkpoint": self.rival.hash,
            "run": self.rival.folder.name,
            "cosine": {
                name: compare(tally.image_cosine(), rivals[name].image_cosine())
                for name, tally in estimators.items()
                if name in rivals
            },
        }
