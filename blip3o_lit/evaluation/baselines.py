"""Baselines fitted on a training split, and kept by what they were fitted on.

A fit is a function of the split's content, the view, the token scales and the fit's settings; their
hash names a safetensors file, so a second evaluation fits nothing.
Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.condition import AnyCondition
from blip3o_lit.base.progress import Report
from blip3o_lit.base.shape import PairShape
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config import registry as register
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.evaluation.estimators import Estimator
from blip3o_lit.models.baselines import MeanToken, Ridge
from blip3o_lit.models.fitted import load_or_fit
from blip3o_lit.models.precision import PRECISIONS
from blip3o_lit.models.regression import PatchMLP, Regression
from blip3o_lit.tokens.reading.ahead import fetched_ahead
from blip3o_lit.tokens.reading.order import evenly
from blip3o_lit.tokens.reading.reader import TokenReader

FORMAT = 2
_BATCH = 64

Baseline = MeanToken | Ridge | PatchMLP | Regression
NEED_GRID = ("ridge", "mlp")
"""They predict a token from the grid's token at its place: of a condition they read the grid."""
Pairs = Iterator[tuple[AnyCondition, Tensor]]
"""Batches of standardised condition and target tokens."""


class BaselineFits:
    """Fits baselines on the training split `train`, or finds them fitted in `folder`.

    They are trained as the run was, for at most `baseline_steps`.
    """

    def __init__(
        self,
        train: TokenReader,
        loaded: Loaded,
        config: EvaluateConfig,
        folder: Path,
        report: Report,
    ) -> None:
        self.train, self.folder, self.report = train, folder, report
        self.run, self.config = loaded.config, config
        self.steps = min(loaded.facts["step"] or self.run.trainer.max_steps, config.baseline_steps)
        self.bf16 = PRECISIONS[self.run.precision.name].products == torch.bfloat16
        self.translator, self.target = loaded.translator, loaded.translator.target_standardizer
        self.device = loaded.device
        digest = hashlib.sha256(train.content_hash.encode())
        scales = (loaded.translator.condition_standardizer, self.target)
        scales += (loaded.translator.words_standardizer,)
        for tensor in (buffer for scale in scales if scale for buffer in scale.buffers()):
            digest.update(tensor.float().cpu().numpy().tobytes())
        self.data_hash = digest.hexdigest()

    def estimator(self, name: str) -> Estimator:
        baseline = self.get(name)

        def predict(condition: AnyCondition, sample_B: Tensor) -> tuple[Tensor, int]:
            standard_BND = baseline.predict(self._standardised(name, condition))
            return self.target.restore(standard_BND), 0

        return predict

    def mean_token(self) -> Tensor:
        """Return the raw mean token per position `[N, D]`."""
        mean_BND = self.get("mean_token").predict(torch.empty(1, 0, device=self.device))
        return self.target.restore(mean_BND)[0]

    def file(self, name: str) -> Path:
        """Return where a baseline is kept once it is fitted."""
        key = json.dumps([FORMAT, name, self.data_hash, self.settings(name)], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.folder / f"{name}-{digest}.safetensors"

    def get(self, name: str) -> Baseline:
        """Return a fitted baseline, which works in standardised space."""
        torch.manual_seed(self.run.seed)
        baseline = _unfitted(name, self.run.model, self.train.shape).to(self.device)
        load_or_fit(baseline, self.file(name), lambda: self._fit(name, baseline))
        return baseline.eval()

    def settings(self, name: str) -> dict[str, Any]:
        """Return what a fit depends on beside its data."""
        own = register.baseline.own(name)
        if name in ("mean_token", "ridge") or own is not None:
            where = {"package": own.package, "version": own.version} if own is not None else {}
            return {"images": self.config.baseline_images, **where}
        run = self.run
        settings: dict[str, Any] = {"steps": self.steps, "batch_size": run.batch_size}
        settings |= {"bf16": self.bf16, "seed": run.seed}
        if name == "regression":
            settings |= {"model": asdict(run.model), "optimizer": asdict(run.optimizer)}
            settings["cosine_weight"] = run.flow.cosine_weight
        return settings

    def _fit(self, name: str, baseline: Baseline) -> None:
        if not isinstance(baseline, PatchMLP | Regression):
            baseline.fit(lambda: self._in_order(name))
            return
        draws = np.random.default_rng(self.run.seed)

        def progress(step: int, loss: Tensor) -> None:
            self.report(name, step, self.steps)

        def shuffled() -> Pairs:
            return self._shuffled(name, draws)

        if isinstance(baseline, PatchMLP):
            baseline.fit(shuffled, self.steps, bf16=self.bf16, progress=progress)
            return
        weight, restore = self.run.flow.cosine_weight, self.target.restore
        optimizer = self.run.optimizer
        baseline.fit(shuffled, self.steps, optimizer, self.bf16, progress, weight, restore)

    def _standardised(self, name: str, condition: AnyCondition) -> AnyCondition:
        """Return what a baseline reads of a raw condition."""
        condition = self.translator.standardised(condition)
        if isinstance(condition, Tensor) or name not in NEED_GRID:
            return condition
        assert condition.grid is not None
        return condition.grid

    def _batch(self, name: str, ids: np.ndarray) -> tuple[AnyCondition, Tensor]:
        batch = self.train.read(ids)
        condition = self._standardised(name, batch["condition"].to(self.device))
        return condition, self.target.standardise(batch["target"].to(self.device))

    def _in_order(self, name: str) -> Pairs:
        """Yield one pass over `baseline_images` images, evenly spaced over the split."""
        count = min(self.config.baseline_images, len(self.train))
        ids = evenly(len(self.train), count)
        batches = np.split(ids, range(_BATCH, count, _BATCH))
        done = 0
        for batch in fetched_ahead(self.train, batches, batches):
            yield self._batch(name, batch)
            done += len(batch)
            self.report(name, done, count)

    def _shuffled(self, name: str, draws: np.random.Generator) -> Pairs:
        """Yield one pass in random order; a smaller last batch is dropped."""
        size = min(self.run.batch_size, len(self.train))
        order = draws.permutation(len(self.train))
        for start in range(0, len(order) - size + 1, size):
            yield self._batch(name, order[start : start + size])


def _unfitted(name: str, model: ModelConfig, shape: PairShape) -> Baseline:
    if name == "regression":
        return Regression(model, shape)
    if register.baseline.own(name) is not None:
        return register.baseline.build(name, shape)
    shape = replace(shape, words=None) if name in NEED_GRID else shape
    return {"mean_token": MeanToken, "ridge": Ridge, "mlp": PatchMLP}[name](shape)
