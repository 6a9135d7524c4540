"""The images that are scored on, in batches on the translator's device."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch

from blip3o_lit.base.progress import Report
from blip3o_lit.evaluation.estimators import Batch
from blip3o_lit.tokens.reading.ahead import fetched_ahead
from blip3o_lit.tokens.reading.reader import TokenReader


class HeldOut:
    """Reads batches of a split, and reports each when it has been scored."""

    def __init__(
        self, reader: TokenReader, device: torch.device, batch_size: int, report: Report
    ) -> None:
        self.reader, self.device, self.batch_size = reader, device, batch_size
        self.report = report

    def read(self, ids: np.ndarray) -> Batch:
        batch = self.reader.read(ids)
        condition, target = batch["condition"].to(self.device), batch["target"].to(self.device)
        return condition, target, torch.from_numpy(ids)

    def batches(self, images: int, phase: str, borders: Iterable[int] = ()) -> Iterator[Batch]:
        """Yield the first `images` images; no batch crosses one of the `borders`."""
        self.report(phase, 0, images)
        cuts = sorted({min(border, images) for border in (0, *borders, images)})
        batches = []
        for start, end in pairwise(cuts):
            firsts = range(self.batch_size, end - start, self.batch_size)
            batches += np.split(np.arange(start, end), firsts)
        for ids in fetched_ahead(self.reader, batches, batches):
            yield self.read(ids)
            self.report(phase, int(ids[-1]) + 1, images)
