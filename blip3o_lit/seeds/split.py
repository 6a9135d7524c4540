"""Which split a converted sample belongs to: by its content, or by the seeds' own shuffles."""

import hashlib
import math
import random

import numpy as np
import torch

from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError


class Split:
    """A function from (file, row, condition tokens) to `train` or `validation`.

    The seeds split a single file by rows and a folder by shards; the last part of the shuffled
    ones was held out.
    """

    def __init__(self, samples: list[int], patches: int, config: ConvertConfig) -> None:
        """Prepare the rule for files of so many samples, of so many patches each."""
        fraction, seed = config.validation_fraction, config.seed
        self.by_content = config.split_rule == "hash"
        self.by_rows = len(samples) == 1
        self.threshold, self.seed, self.patches = fraction, seed, patches
        share = f"seed {seed}, {fraction:.4g} of all"
        if self.by_content:
            self.words = f"sha256 of the condition's patch tokens, {share}, at least one image"
            return
        if self.by_rows:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(samples[0], generator=generator).tolist()
            count = int(len(order) * fraction)
            self.words = f"rows, last of torch.randperm, {share}"
        else:
            order = list(range(len(samples)))
            random.Random(seed).shuffle(order)
            count = max(1, int(len(order) * fraction)) if fraction else 0
            self.words = f"shards, last of random.shuffle, {share}"
        if fraction and not count:
            raise UserError(
                f"split_rule=seed holds out int({samples[0]} * {fraction}) = 0 rows: "
                "raise validation_fraction or use split_rule=hash"
            )
        self.held_out = set(order[len(order) - count :])

    def settle(self, shares: list[float]) -> None:
        """Move the threshold so that neither split is empty, given the `share` of every sample."""
        low, high = min(shares), max(shares)
        if low < high and self.threshold:
            self.threshold = min(max(self.threshold, math.nextafter(low, 1)), high)

    def share(self, condition_NC: np.ndarray) -> float:
        """Return a number in [0, 1) that equal patch tokens share, whatever else differs.

        A CLS token does not count, nor does more than fp16.
        """
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(condition_NC[-self.patches :], np.float16)
        digest = hashlib.sha256(str(self.seed).encode())
        digest.update(stored.data)
        return int.from_bytes(digest.digest()[:6], "big") / 2**48

    def __call__(self, file: int, row: int, condition_NC: np.ndarray) -> str:
        if self.by_content:
            held_out = self.share(condition_NC) < self.threshold
        else:
            held_out = (row if self.by_rows else file) in self.held_out
        return "validation" if held_out else "train"
