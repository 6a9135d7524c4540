"""Score a translator on one split, beside baselines, with the same images and noise for all.

Shape suffixes: B images, N target tokens, D target width.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blip3o_lit.base.progress import Report
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import BASELINE_SETS, EvaluateConfig
from blip3o_lit.config.solver import solver_from_label
from blip3o_lit.evaluation.baselines import NEED_GRID, BaselineFits
from blip3o_lit.evaluation.drawings import Drawings
from blip3o_lit.evaluation.estimators import (
    Batch,
    Estimator,
    exact_estimators,
    known_problem,
)
from blip3o_lit.evaluation.examples import examples, worst
from blip3o_lit.evaluation.guidance import guidance_curve
from blip3o_lit.evaluation.held_out import HeldOut
from blip3o_lit.evaluation.hidden_half import shows_scenes
from blip3o_lit.evaluation.image_text import ImageText
from blip3o_lit.evaluation.main_pass import Group, MainPass, Tallies
from blip3o_lit.evaluation.picture_rows import caption_rows, ranked_rows
from blip3o_lit.evaluation.probes import Coverage, swapped, time_bins
from blip3o_lit.evaluation.solver_fits import fit_solvers, missing_budgets
from blip3o_lit.evaluation.tally import Reference
from blip3o_lit.evaluation.tallying import Tallying, scores_of_averages
from blip3o_lit.evaluation.verdict import check_finite, standing, verdict, verdict_note
from blip3o_lit.flow.memo import Memo
from blip3o_lit.report.record import FORMAT
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.reader import TokenReader

CURVE = ("cosine", "cosine_centred", "mse", "frechet", "norm_ratio", "seconds_per_image")
GENERATED = "generated"
HALVES = ("demo_masked", "demo_half_text")
"""Data whose condition tower sees the left half alone."""


class Scorer:
    """Scores `loaded` on `held`, beside baselines of `train`, which `folder` keeps.

    `rival`, another translator of the same tokens, is compared with it image by image, and
    `averages`, of its own run's weights by width, are scored in the same pass.
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
        averages: dict[float, Loaded] | None = None,
    ) -> None:
        self.loaded, self.reader, self.train, self.rival = loaded, held, train, rival
        self.config, self.averages = config, averages or {}
        self.shape = loaded.shape.target
        self.images = min(config.images or len(held), len(held))
        self.solver_images = min(config.solver_images or self.images, self.images)
        self.curve_images = min(config.curve_images, self.images)
        labels = [*config.estimators, *config.curve]
        # Taken now: a run that goes on removes and replaces its files.
        self.checkpoint = loaded.hash
        self.rival_checkpoint = rival.hash if rival is not None else ""
        budgets = missing_budgets(loaded, labels)
        self.content = loaded.content if budgets else ""
        fit_solvers(loaded, train, budgets, config.seed, report)
        if rival is not None:
            fit_solvers(rival, train, missing_budgets(rival, labels), config.seed, report)
        self.device = loaded.device
        self.held_out = HeldOut(held, self.device, config.batch_size, report)
        self.baselines = [*BASELINE_SETS[config.baselines], *config.own_baselines]
        self.left_out: list[str] = []
        if loaded.shape.condition is None:
            self.left_out = [name for name in self.baselines if name in NEED_GRID]
            self.baselines = [name for name in self.baselines if name not in NEED_GRID]
        if train is None and self.baselines:
            raise UserError(
                f"{held.store.address} has no train split to fit baselines on: set baselines=none"
            )
        self.fits = None
        self.mean_ND = loaded.translator.target_standardizer.mean_NC
        if train is not None:
            self.fits = BaselineFits(train, loaded, config, folder, report)
            self.mean_ND = self.fits.mean_token()
        self.image_text = ImageText(held, train, self.device, loaded.shape.words is not None)
        # Its images are among those that the solvers draw samples of: all have the same ones.
        masked = loaded.config.data.name in HALVES and shows_scenes(held)
        self.has_words = loaded.shape.words is not None
        named = self.has_words and shows_scenes(held)
        self.drawings = Drawings(
            held, train, config, self.solver_images, folder, report, masked, named
        )

    def run(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`, which has finite numbers only."""
        translators = [one.translator for one in (self.loaded, self.rival) if one is not None]
        for translator in translators:
            translator.memo = Memo(self.device)
        try:
            return self._result()
        finally:
            for translator in translators:
                translator.memo = None

    def _result(self) -> dict[str, Any]:
        tallying = Tallying(self.config, self.shape, self.device, self.mean_ND)
        estimators = tallying.estimators(self.loaded)
        baselines = tallying.of(self._baselines())
        problem = known_problem(self.reader)
        optima = tallying.of(exact_estimators(problem) if problem else {})
        rivals = tallying.estimators(self.rival) if self.rival else {}
        headline = next(iter(estimators))
        averaged = tallying.averaged(self.averages, headline)
        scored = MainPass(
            self.shape, self.device, self.images, self.solver_images, self.curve_images
        )
        for prefix, tallies in (("", estimators), ("vs ", rivals)):
            for name, tally in tallies.items():
                group = scored.every if name == headline else scored.solvers
                group.tallies[prefix + name] = tally
        scored.every.tallies |= {f"average {name}": tally for name, tally in averaged.items()}
        scored.every.tallies |= baselines
        scored.every.tallies |= {f"optimum {name}": tally for name, tally in optima.items()}
        scored.curve.tallies = tallying.curve(self.loaded)
        scored.draws = tallying.draws(self.loaded, self.drawings.add_draws)
        scored.draw_images = min(self.config.sample_images, self.images)
        if problem is not None and len(problem.weights_K) > 1:
            scored.coverage = Coverage(self.reader.store.path)
        own = estimators | baselines
        scored.run(self.held_out, lambda tokens, batch: self._watch(tokens, batch, headline, own))
        reference, solver_reference = scored.every.reference, scored.solvers.reference
        cosine_B = estimators[headline].image_cosine()
        result: dict[str, Any] = {
            **self._provenance(),
            "headline": headline,
            "estimators": self._scores(estimators, reference, solver_reference),
            "baselines": self._scores(baselines, reference),
            "frechet_floor": reference.floor(),
            "stores": self._stores({**estimators, **baselines}),
            "retrieval": self.image_text.retrieval(),
            "zero_shot": self.image_text.zero_shot(),
            "worst": worst(self.reader, cosine_B),
            "examples": self._examples(cosine_B),
            "nfe_curve": self._curve_points(scored.curve),
            "time_bins": time_bins(
                self.loaded.translator,
                self.held_out.batches(self.curve_images, "loss by time"),
                self.config.seed,
            ),
            "samples": self._samples(scored),
            "drawings": {**self.drawings.facts(), **self._picture_rows(own, cosine_B)},
            "swapped": self._swapped(estimators),
            "against": {
                name: {key: tally.compared_with(other) for key, other in baselines.items()}
                for name, tally in estimators.items()
            },
            **estimators[headline].maps,
        }
        if averaged:
            kept = result["estimators"][headline]
            result["averages"] = scores_of_averages(kept, self.averages, averaged, reference)
        records = self.loaded.translator.fitted.records
        if records:
            result["fitted_solvers"] = {str(nfe): records[nfe] for nfe in sorted(records)}
        for name, tally in estimators.items():
            result["estimators"][name]["nfe"] = tally.nfe
        if self.config.guided:
            result["guidance"] = guidance_curve(self.config.guided, result)
        if problem is not None:
            result["optimum"] = self._scores(optima, reference)
            result["optimum"]["mean"]["expected_mse"] = problem.token_error()
            result["optimum"]["sample"]["expected_mse"] = 2 * problem.token_error()
        if scored.coverage is not None:
            result["coverage"] = scored.coverage.result()
        if self.rival:
            both = {name: rivals[name] for name in estimators if name in rivals}
            result["paired"] = {
                "checkpoint": self.rival_checkpoint,
                "run": self.rival.folder.name,
                "cosine": {name: estimators[name].compared_with(both[name]) for name in both},
            }
        if self.left_out:
            result["left_out"] = self.left_out
        result["verdict"] = verdict(result["estimators"][headline]["cosine"])
        result["standing"] = standing(result)
        result["verdict_note"] = verdict_note(result)
        check_finite(result)
        return result

    def _baselines(self) -> dict[str, Estimator]:
        if self.fits is None:
            return {}
        return {name: self.fits.estimator(name) for name in self.baselines}

    def _watch(self, tokens: dict[str, Tensor], batch: Batch, headline: str, own: Tallies) -> None:
        """Draw tokens of a batch, and ask what they mean."""
        _, true_BND, sample_B = batch
        drawn = {name: tokens_BND for name, tokens_BND in tokens.items() if name in own}
        self.drawings.add(drawn, true_BND, sample_B)
        meant = {GENERATED: tokens[headline]}
        meant |= {name: tokens[name] for name in self.baselines}
        if self.has_words:
            meant |= {name: tokens[name] for name in own if name in tokens and name != headline}
        meant["true"] = true_BND
        meant["mean_token"] = self.mean_ND.expand(len(sample_B), -1, -1)
        self.image_text.add(meant, sample_B.numpy())

    def _provenance(self) -> dict[str, Any]:
        mode, facts = self.reader.mode, self.loaded.facts
        return {
            "format": FORMAT,
            "split": self.reader.split,
            "images": self.images,
            "mode": mode.name,
            "projected": mode.projected,
            "tokens": self.reader.store.index.hash,
            "trained_on_these": (
                self.train is not None and self.train.content_hash == facts["tokens"]["hash"]
            ),
            "checkpoint": self.checkpoint,
            "step": facts["step"],
            "seed": self.config.seed,
            "metrics": list(self.config.metrics),
        }

    def _stores(self, tallies: Tallies) -> dict[str, Any]:
        """Return the mean cosine of each store's own images; empty with one store."""
        if not isinstance(self.reader, MixedReader):
            return {}
        store_B = self.reader.numbers(np.arange(self.images))
        found: dict[str, Any] = {}
        for number, name in enumerate(self.reader.names):
            found[name] = {"images": int((store_B == number).sum()), "cosine": {}}
            for estimator, tally in tallies.items():
                cosine_B = tally.image_cosine()
                own_B = cosine_B[store_B[: len(cosine_B)] == number]
                if len(own_B):
                    found[name]["cosine"][estimator] = float(own_B.mean())
        return found

    def _scores(
        self, tallies: Tallies, reference: Reference, solver_reference: Reference | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the scores of each; those of fewer images beside the floor of these images."""
        scores: dict[str, dict[str, Any]] = {}
        for name, tally in tallies.items():
            scores[name] = {"split": self.reader.split}
            if solver_reference is None or tally.images == self.images:
                scores[name] |= tally.result(reference)
            else:
                scores[name] |= tally.result(solver_reference)
                floor = solver_reference.floor()
                scores[name] |= {f"floor_{key}": value for key, value in floor.items()}
            scores[name] |= self.drawings.scores(name)
        return scores

    def _examples(self, cosine_B: np.ndarray) -> dict[str, Any]:
        recall = self.image_text.recall[self.image_text.nearest]
        sources = {name: recall[name] for name in (GENERATED, "true") if name in recall}
        return examples(self.reader, cosine_B, sources, self.config.pictures)

    def _picture_rows(self, tallies: Tallies, cosine_B: np.ndarray) -> dict[str, Any]:
        if self.drawings.drawer is None:
            return {}
        common = self.drawings, self.held_out, self.loaded, self.config, tallies
        if self.has_words:
            return {"rows": caption_rows(*common, self.images)}
        return {"rows": ranked_rows(*common, cosine_B)}

    def _curve_points(self, curve: Group) -> list[dict[str, Any]]:
        points = []
        for label, tally in curve.tallies.items():
            solver = solver_from_label(label)
            point = {"solver": solver.name, "nfe": tally.nfe, "images": self.curve_images}
            scores = tally.result(curve.reference)
            points.append(point | {name: scores[name] for name in CURVE if name in scores})
        return points

    def _samples(self, scored: MainPass) -> dict[str, Any]:
        if scored.draws is None:
            return {}
        solver = solver_from_label(self.config.solvers[0]).label
        return {"solver": solver, "images": scored.draw_images, **scored.draws.result()}

    def _swapped(self, tallies: Tallies) -> dict[str, Any]:
        if self.curve_images < 2:
            return {}
        estimators = {name: tally.predict for name, tally in tallies.items()}
        return swapped(estimators, self.held_out.batches(self.curve_images, "swapped conditions"))
