"""Baselines fitted on a training split, and kept by what they were fitted on.

A fit is a function of the split's content, the view, the token scales and the fit's settings; their
hash names a safetensors file under home()/baselines, so a second evaluation fits nothing.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip3o_lit.base.files import replacing
from blip3o_lit.base.progress import Report
from blip3o_lit.base.shape import PairShape
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.baselines import MeanToken, Ridge
from blip3o_lit.models.precision import PRECISIONS
from blip3o_lit.models.regression import PatchMLP, Regression
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.translation.translator import Translator

FORMAT = 2
CLOSED_FORM = ("mean_token", "ridge")
_BATCH = 64

"""Called with (what is being done, units done, units in all)."""


class Baseline(Protocol):
    """What every baseline can do, in standardised space."""

    def predict(self, condition_BMC: Tensor) -> Tensor:
        """Predict the target tokens `[B, N, D]`."""
        ...


@dataclass(frozen=True)
class FitSettings:
    """What a fit depends on beside its data."""

    model: ModelConfig
    """Network of the noise-free transformer: the run's own."""
    steps: int
    """Training steps of MLP and transformer."""
    batch_size: int
    """Images a training step."""
    optimizer: OptimizerConfig
    """Optimizer of the transformer, with the peak learning rate: the run's own."""
    bf16: bool
    """Whether training runs under bf16 autocast, as the run did."""
    cosine_weight: float
    """Weight of the cosine term of the transformer's loss: the run's own."""
    images: int
    """Training images of the closed-form fits, at most."""
    seed: int = 0
    """Seed of weights and data order."""

    def of(self, name: str) -> dict[str, Any]:
        """Return those that matter to one baseline."""
        if name in CLOSED_FORM:
            return {"images": self.images}
        shared = asdict(self)
        del shared["images"]
        if name == "mlp":
            del shared["model"], shared["optimizer"], shared["cosine_weight"]
        return shared


def fit_settings(loaded: Loaded, config: EvaluateConfig) -> FitSettings:
    """Return how trained baselines are fitted: as the run was, for at most `baseline_steps`."""
    run = loaded.config
    return FitSettings(
        model=run.model,
        steps=min(loaded.facts["step"] or run.trainer.max_steps, config.baseline_steps),
        batch_size=run.batch_size,
        optimizer=run.optimizer,
        bf16=PRECISIONS[run.precision.name].products == torch.bfloat16,
        cosine_weight=run.flow.cosine_weight,
        images=config.baseline_images,
        seed=run.seed,
    )


class BaselineFits:
    """Fits baselines on a training split, or finds them fitted.

    Args:
        train: The training split in the view of the run.
        translator: Gives the token scales and the device.
        settings: What a fit depends on beside its data.
        folder: Where fitted baselines are kept.
        report: Told of the progress.
    """

    def __init__(
        self,
        train: TokenReader,
        translator: Translator,
        settings: FitSettings,
        folder: Path,
        report: Report,
    ) -> None:
        self.train, self.settings, self.folder, self.report = train, settings, folder, report
        self.condition = translator.condition_standardizer
        self.target = translator.target_standardizer
        self.device = next(translator.network.parameters()).device
        digest = hashlib.sha256(train.content_hash.encode())
        for tensor in (*self.condition.buffers(), *self.target.buffers()):
            digest.update(tensor.float().cpu().numpy().tobytes())
        self.data_hash = digest.hexdigest()

    def get(self, name: str) -> Baseline:
        """Return a fitted baseline by its name in `evaluation.json`."""
        settings = self.settings
        key = json.dumps([FORMAT, name, self.data_hash, settings.of(name)], sort_keys=True)
        file = self.folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        torch.manual_seed(settings.seed)
        baseline = _make(name, settings.model, self.train.shape).to(self.device)
        if file.is_file():
            baseline.load_state_dict(load_file(file, device=str(self.device)))
            return baseline.eval()  # type: ignore[return-value]
        if isinstance(baseline, MeanToken | Ridge):
            baseline.fit(lambda: self._in_order(name))
        else:
            assert isinstance(baseline, PatchMLP | Regression)
            own: dict[str, Any] = {}
            if name == "regression":
                own = {"config": settings.optimizer, "cosine_weight": settings.cosine_weight}
                own["restore"] = self.target.restore
            steps = settings.steps

            def progress(step: int, loss: Tensor) -> None:
                self.report(name, step, steps)

            passes = _Shuffled(self)
            baseline.fit(passes, steps, bf16=settings.bf16, progress=progress, **own)
        state = {key: value.contiguous().cpu() for key, value in baseline.state_dict().items()}
        with replacing(file) as temporary:
            save_file(state, temporary)
        return baseline.eval()  # type: ignore[return-value]

    def batch(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read standardised condition and target tokens."""
        batch = self.train.read(ids)
        condition = self.condition.standardise(batch["condition"].to(self.device))
        return condition, self.target.standardise(batch["target"].to(self.device))

    def _in_order(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one pass over `settings.images` images, evenly spaced over the split."""
        count = min(self.settings.images, len(self.train))
        ids = np.linspace(0, len(self.train) - 1, count).round().astype(np.int64)
        for start in range(0, count, _BATCH):
            yield self.batch(ids[start : start + _BATCH])
            self.report(name, min(start + _BATCH, count), count)


class _Shuffled:
    """Each call is a pass over the split in another, seeded order."""

    def __init__(self, fits: BaselineFits) -> None:
        self.fits = fits
        self.draws = np.random.default_rng(fits.settings.seed)

    def __call__(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield batches; the last one of a pass is dropped unless it is the only one."""
        size = min(self.fits.settings.batch_size, len(self.fits.train))
        order = self.draws.permutation(len(self.fits.train))
        for start in range(0, len(order) - size + 1, size):
            yield self.fits.batch(order[start : start + size])


def _make(name: str, model: ModelConfig, shape: PairShape) -> nn.Module:
    """Return an unfitted baseline."""
    if name == "mean_token":
        return MeanToken(shape)
    if name == "ridge":
        return Ridge(shape)
    if name == "mlp":
        return PatchMLP(shape)
    return Regression(model, shape)
