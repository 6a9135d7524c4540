"""Score a translator on one split, beside baselines, with the same images and noise for all.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width,
P embedding width.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.baseline_cache import Baseline, BaselineFits, FitSettings, Report
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import BASELINE_SETS, EvaluateConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.inference import Loaded, solver_from_label
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.metrics.frechet import Moments
from blip3o_lit.metrics.retrieval import caption_ids
from blip3o_lit.tally import (
    Estimator,
    Reference,
    Tally,
    exact_estimators,
    known_problem,
    read_out,
)
from blip3o_lit.tokens.reader import TokenReader
from blip3o_lit.translator import Translator

VERDICTS = ((0.8, "excellent"), (0.6, "good"), (0.3, "works"))


class Scorer:
    """Holds what all estimators of one evaluation share.

    Args:
        loaded: The translator.
        held: The images to score on.
        train: The training split, or None where the store has none.
        config: The evaluate command's settings.
        folder: Where fitted baselines are kept.
        report: Told of the progress.
    """

    def __init__(
        self,
        loaded: Loaded,
        held: TokenReader,
        train: TokenReader | None,
        config: EvaluateConfig,
        folder: Path,
        report: Report,
    ) -> None:
        self.loaded, self.held, self.config, self.report = loaded, held, config, report
        self.translator = loaded.translator
        self.shape = loaded.shape.target
        self.device = next(self.translator.network.parameters()).device
        self.names = BASELINE_SETS[config.baselines]
        if train is None and self.names:
            raise UserError(
                f"{held.store.path} has no train split to fit baselines on: set baselines=none"
            )
        self.fits = None
        if train is not None:
            run = loaded.config
            steps = loaded.facts["step"] or run.trainer.max_steps
            settings = FitSettings(
                model=run.model,
                steps=min(steps, config.baseline_steps),
                batch_size=run.batch_size,
                lr=run.optimizer.lr,
                bf16=run.precision.name in ("bf16", "bf16_true"),
                images=config.baseline_images,
            )
            self.fits = BaselineFits(train, self.translator, settings, folder, report)
        self.mean_ND = self._mean_token()
        self.read_out_name, self.read_out = read_out(held, self.device)

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
        solvers = [SolverConfig(), *map(solver_from_label, config.solvers)]
        if not self.loaded.config.flow.has_mean:
            solvers = solvers[1:]
        if not solvers:
            raise UserError("this flow has no posterior mean at t = 0: name a solver in solvers=[]")
        estimators = {solver.label: self._tally(self._generate(solver)) for solver in solvers}
        baselines = {name: self._tally(self._baseline(name)) for name in self.names}
        images = min(config.images or len(self.held), len(self.held))
        problem = known_problem(self.held)
        optima = {name: self._tally(law) for name, law in exact_estimators(problem).items()}
        tallies = {**estimators, **baselines}
        tallies |= {f"optimum {name}": tally for name, tally in optima.items()}
        reference = self._pass(tallies, images, "scoring", retrieval=True)
        headline = next(iter(estimators))
        report = {
            "split": self.held.split,
            "images": images,
            "mode": self.held.mode.name,
            "projected": self.held.mode.projected,
            "tokens": self.held.store.index.hash,
            "checkpoint": file_hash(self.loaded.file),
            "step": self.loaded.facts["step"],
            "seed": config.seed,
            "headline": headline,
            "estimators": {
                name: {"nfe": tally.nfe, **tally.result(reference.true)}
                for name, tally in estimators.items()
            },
            "baselines": {name: tally.result(reference.true) for name, tally in baselines.items()},
            "frechet_floor": reference.floor(),
            "retrieval": self._retrieval(estimators[headline], baselines, reference),
            "nfe_curve": self._curve(),
        }
        groups = [report["estimators"], report["baselines"]]
        if problem is not None:
            expected = float(problem.covariance_DD.trace()) / self.shape.width
            report["optimum"] = {
                name: {**tally.result(reference.true), "expected_mse": (1 + number) * expected}
                for number, (name, tally) in enumerate(optima.items())
            }
            groups.append(report["optimum"])
        blocks = [block for group in groups for block in group.values()]
        report["position_cosine"] = report["estimators"][headline]["position_cosine"]
        for block in blocks:
            del block["position_cosine"]
            block["split"] = self.held.split
        cosine = report["estimators"][headline]["cosine"]
        report["verdict"] = verdict(cosine)
        report["verdict_note"] = verdict_note(report)
        check_finite(report, "")
        return report

    def _tally(self, predict: Estimator) -> Tally:
        scores = TokenScores(self.mean_ND, self.shape).to(self.device)
        return Tally(predict, scores, Moments(self.shape.width).to(self.device))

    def _generate(self, solver: SolverConfig) -> Estimator:
        """Return the translator as an estimator."""
        flow = self.loaded.config.flow
        if solver.name != "mean" and flow.prediction == "noise":
            solver.start = max(solver.start, self.loaded.config.solver.start or 0.02)

        def generate(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
            made = self.translator.generate(condition_BMC, sample_B, self.config.seed, solver)
            return made.x1_BND, made.nfe

        return generate

    def _baseline(self, name: str) -> Estimator:
        """Return a fitted baseline as an estimator."""
        assert self.fits is not None
        baseline: Baseline = self.fits.get(name)
        translator: Translator = self.translator

        def predict(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
            condition_BMC = translator.condition_standardizer.standardise(condition_BMC)
            return translator.target_standardizer.restore(baseline.predict(condition_BMC)), 0

        return predict

    def _pass(
        self, tallies: dict[str, Tally], images: int, what: str, retrieval: bool = False
    ) -> Reference:
        """Feed the first `images` images to every tally."""
        true = Reference(self.shape.width, self.device)
        for start in range(0, images, self.config.batch_size):
            ids = np.arange(start, min(start + self.config.batch_size, images))
            batch = self.held.read(ids)
            condition, true_BND = (
                batch["condition"].to(self.device),
                batch["target"].to(self.device),
            )
            sample_B = torch.from_numpy(ids)
            if start == 0:  # the first call pays for caches and kernels: keep it out of the times
                next(iter(tallies.values())).predict(condition[:1], sample_B[:1])
            true.add(true_BND[:, int(self.shape.cls) :].double().mean(1), sample_B)
            text_BP = self.held.text(ids) if retrieval and self.read_out else None
            made = {
                name: tally.add(condition, true_BND, sample_B) for name, tally in tallies.items()
            }
            if text_BP is not None and self.read_out:
                captions = caption_ids(self.held.captions(ids))
                for name, tokens in made.items():
                    tallies[name].retrieval.update(self.read_out(tokens).cpu(), text_BP, captions)
                embedding_BP = self.read_out(true_BND).cpu()
                true.retrieval.update(embedding_BP, text_BP, captions)
                true.chance.update(torch.zeros_like(embedding_BP), text_BP, captions)
                constant = self.mean_ND.expand(len(ids), -1, -1)
                true.mean_token.update(self.read_out(constant).cpu(), text_BP, captions)
            self.report(what, int(ids[-1]) + 1, images)
        return true

    def _curve(self) -> list[dict[str, Any]]:
        """Return the scores at each point of the curve over network evaluations."""
        solvers = [solver_from_label(label) for label in self.config.curve]
        tallies = {solver.label: self._tally(self._generate(solver)) for solver in solvers}
        if not tallies:
            return []
        images = min(self.config.curve_images, len(self.held))
        reference = self._pass(tallies, images, "curve")
        keep = ("cosine", "cosine_centred", "mse", "frechet", "norm_ratio", "seconds_per_image")
        points = []
        for solver, tally in zip(solvers, tallies.values()):
            scores = tally.result(reference.true)
            point = {name: scores[name] for name in keep if name in scores}
            points.append({"solver": solver.name, "nfe": tally.nfe, "images": images, **point})
        return points

    def _retrieval(
        self, headline: Tally, baselines: dict[str, Tally], reference: Reference
    ) -> dict[str, Any]:
        """Return recall from generated tokens beside true tokens, mean token and chance."""
        if not self.read_out:
            return {}
        rows = {"generated": headline.retrieval, "true": reference.retrieval}
        rows |= {f"baseline_{name}": tally.retrieval for name, tally in baselines.items()}
        rows.pop("baseline_mean_token", None)
        rows |= {"mean_token": reference.mean_token, "chance": reference.chance}
        table: dict[str, Any] = {name: metric.compute() for name, metric in rows.items()}
        return {"read_out": self.read_out_name, **table}


def verdict(cosine: float) -> str:
    """Return the seeds' word for a cosine; read it beside the baselines."""
    return next((word for least, word in VERDICTS if cosine >= least), "failing")


def verdict_note(report: dict[str, Any]) -> str:
    """Return one line that puts the headline cosine beside every baseline's."""
    cosine = report["estimators"][report["headline"]]["cosine"]
    where = f"cosine {cosine:.4f} on {report['images']} {report['split']} images"
    others = {name: scores["cosine"] for name, scores in report["baselines"].items()}
    if not others:
        return f"{where}; no baseline was fitted, so the number says little"
    listed = ", ".join(f"{name} {value:.4f}" for name, value in others.items())
    name, best = max(others.items(), key=lambda item: item[1])
    place = "above every baseline" if cosine > best else f"not above {name}"
    return f"{where}, {place} ({listed})"


def check_finite(value: Any, place: str) -> None:
    """Raise if a number in nested dicts and lists is NaN or infinite; `place` says where."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for item in value:
            check_finite(item, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{place} is {value}: the checkpoint generates tokens that are not finite: use an "
            "earlier checkpoint, or train with a lower optimizer.lr"
        )


def file_hash(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
