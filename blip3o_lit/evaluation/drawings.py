"""Drawn tokens of an evaluation: how near they come to the true ones, and rows of pictures.

Shape suffixes: K samples, B images, N target tokens, D target width, H and W pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.progress import Report
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.drawing.decoder import load_decoder
from blip3o_lit.drawing.digits import SCENES, digit_reader
from blip3o_lit.drawing.drawer import IMAGES as FITTED_IMAGES
from blip3o_lit.drawing.drawer import Drawer, split_readout, thumbnails
from blip3o_lit.drawing.readout import Readout, psnr
from blip3o_lit.drawing.scene_reader import scene_reader
from blip3o_lit.drawing.sheet import Drawing, Row, report_row
from blip3o_lit.evaluation.estimators import Batch, Estimator
from blip3o_lit.evaluation.hidden_half import HiddenHalf
from blip3o_lit.evaluation.named_digits import NamedDigits
from blip3o_lit.metrics.cosine import cosine
from blip3o_lit.tokens.reading.order import evenly
from blip3o_lit.tokens.reading.reader import TokenReader

TRUE = "true"


class Drawings:
    """Draws what estimators predict for some of the first `images` of `held`.

    The read-out is fitted on `train` alone and kept in `folder`. `masked`: the condition tower saw
    the left half of demo scenes alone. `named`: captions of such scenes are part of the condition.
    """

    def __init__(
        self,
        held: TokenReader,
        train: TokenReader | None,
        config: EvaluateConfig,
        images: int,
        folder: Path,
        report: Report,
        masked: bool = False,
        named: bool = False,
    ) -> None:
        self.held, self.config = held, config
        self.why_not = _why_not(held, train, config)
        self.drawer: Drawer | None = None
        self.hidden: HiddenHalf | None = None
        self.named: NamedDigits | None = None
        if self.why_not:
            return
        if config.decoder:
            spec = held.index.arrays[held.target]
            self.drawer = load_decoder(config.decoder, spec, held.shape.target)
        else:
            assert train is not None
            fitted = min(FITTED_IMAGES, len(train))
            report("read-out", 0, fitted)
            self.drawer = split_readout(train, folder)
            report("read-out", fitted, fitted)
        self.ids = evenly(images, config.drawn_images)
        self._psnr: dict[str, dict[str, list[Tensor]]] = {}
        if masked:
            report("digit reader", 0, SCENES)
            self.hidden = HiddenHalf(digit_reader(folder))
            report("digit reader", SCENES, SCENES)
        if named:
            report("scene reader", 0, SCENES)
            self.named = NamedDigits(scene_reader(folder))
            report("scene reader", SCENES, SCENES)

    def add(self, predictions: Mapping[str, Tensor], true_BND: Tensor, sample_B: Tensor) -> None:
        if self.drawer is None:
            return
        rows = np.flatnonzero(np.isin(sample_B.numpy(), self.ids))
        if not len(rows):
            return
        true = self.draw(true_BND[rows])
        self._add(TRUE, true, None, sample_B.numpy()[rows])
        for name, tokens_BND in predictions.items():
            self._add(name, self.draw(tokens_BND[rows]), true, sample_B.numpy()[rows])
        if self.hidden is not None:
            self.hidden.add_captions(self.held.captions(sample_B.numpy()[rows]))

    def add_draws(self, samples_KBND: Tensor) -> None:
        """Count how the several samples of each condition differ."""
        if self.hidden is not None:
            self.hidden.add_draws(torch.stack([self.draw(part) for part in samples_KBND]))

    def draw(self, tokens_BND: Tensor) -> Tensor:
        assert self.drawer is not None
        return self.drawer.draw(tokens_BND).cpu()

    def _add(self, name: str, drawn: Tensor, true: Tensor | None, ids: np.ndarray) -> None:
        scores = self._psnr.setdefault(name, {})
        if true is not None:
            scores.setdefault("psnr", []).append(psnr(drawn, true))
        if self.held.index.thumbnails:
            pictures = self._thumbnails(ids, drawn)
            scores.setdefault("psnr_thumbnail", []).append(psnr(drawn, pictures))
        if self.hidden is not None:
            self.hidden.add(name, drawn)
        if self.named is not None:
            self.named.add(name, drawn, self.held.captions(ids))

    def _thumbnails(self, ids: np.ndarray, like: Tensor) -> Tensor:
        """Return thumbnails at the size of drawn pictures."""
        pictures = thumbnails(self.held, ids)
        if pictures.shape == like.shape:
            return pictures
        size = (like.shape[-2], like.shape[-1])
        return torch.nn.functional.interpolate(pictures, size, mode="bilinear", antialias=True)

    def scores(self, name: str) -> dict[str, float]:
        """Return the means over images, in dB, of one estimator; nothing where none was drawn."""
        if self.drawer is None:
            return {}
        scores = self._psnr.get(name, {})
        means = {key: float(torch.cat(parts).mean()) for key, parts in scores.items()}
        return means | (self.named.scores(name) if self.named is not None else {})

    def facts(self) -> dict[str, Any]:
        """Return what the drawings are made with, and how well true tokens can be drawn at all."""
        if self.drawer is None:
            return {"why_not": self.why_not}
        facts: dict[str, Any] = {"images": len(self.ids), "split": self.held.split}
        facts["by"] = self.config.decoder or "a linear read-out of the training split"
        ceiling = self.scores(TRUE).get("psnr_thumbnail")
        if ceiling is not None:
            facts["ceiling"] = ceiling
        if self.hidden is not None:
            facts["hidden_half"] = self.hidden.result()
        if self.named is not None:
            facts["named"] = self.named.result()
        return facts

    @property
    def readout(self) -> Readout | None:
        return self.drawer if isinstance(self.drawer, Readout) else None

    def rows(
        self, batch: Batch, titles: list[str], estimators: dict[str, Estimator]
    ) -> list[dict[str, object]]:
        """Return a row per image: its thumbnail, its true tokens, and each estimator's tokens.

        Rows have the `titles`, columns the names of the estimators.
        """
        condition, true_BND, sample_B = batch
        ids = sample_B.numpy()
        columns: dict[str, tuple[Tensor, Tensor | None]] = {}
        drawn = self.draw(true_BND)
        if self.held.index.thumbnails:
            columns["picture"] = (thumbnails(self.held, ids), None)
        columns["true tokens"] = (drawn, None)
        for label, estimate in estimators.items():
            tokens_BND, _ = estimate(condition, sample_B)
            cosine_B = cosine(tokens_BND.double(), true_BND.double()).mean(1)
            columns[label] = (self.draw(tokens_BND), cosine_B)
        rows = []
        for number, title in enumerate(titles):
            drawings = []
            for label, (pictures, cosine_B) in columns.items():
                value = None if cosine_B is None else float(cosine_B[number])
                drawings.append(Drawing(label, pictures[number], value))
            rows.append(report_row(Row(title, drawings)))
        return rows


def _why_not(held: TokenReader, train: TokenReader | None, config: EvaluateConfig) -> str:
    """Return why nothing can be drawn, empty where it can."""
    if not config.drawn_images:
        return "drawn_images=0"
    if config.decoder:
        return ""
    if not held.index.thumbnails:
        return "the token store has no thumbnails: extract again with thumbnails=true"
    if train is None:
        return "no training split is at hand to fit a read-out on"
    return ""
