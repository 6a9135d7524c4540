"""Which split a converted sample belongs to: by its content, or by the seeds' own shuffles."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np

from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError


class Split:
    """A function from (file, row, condition tokens) to `train` or `validation`."""

    def __init__(self, samples: list[int], patches: int, config: ConvertConfig) -> None:
        """Prepare the rule for files of so many samples, of so many patches each.

        The seeds split a single file by rows (torch.randperm) and a folder by shards
        (random.Random.shuffle); the last part of either was held out.
        """
        fraction, seed = config.validation_fraction, config.seed
        self.fraction, self.seed, self.rule = fraction, seed, config.split_rule
        self.patches = patches
        self.held_rows: set[int] = set()
        self.held_files: set[int] = set()
        share = f"seed {seed}, {fraction:.4g} of all"
        self.threshold = fraction
        self.words = f"sha256 of the condition's patch tokens, {share}, at least one image"
        if self.rule == "hash":
            return
        if len(samples) == 1:
            import torch

            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(samples[0], generator=generator).tolist()
            self.held_rows = set(order[samples[0] - int(samples[0] * fraction) :])
            self.words = f"rows, last of torch.randperm, {share}"
        elif fraction:
            numbers = list(range(len(samples)))
            random.Random(seed).shuffle(numbers)
            self.held_files = set(numbers[len(samples) - max(1, int(len(samples) * fraction)) :])
            self.words = f"shards, last of random.shuffle, {share}"
        if sum(samples) and not self.held_rows | self.held_files and fraction:
            raise UserError(
                f"split_rule=seed holds out int({samples[0]} * {fraction}) = 0 rows: "
                "raise validation_fraction or use split_rule=hash"
            )

    def settle(self, shares: list[float]) -> None:
        """Move the threshold of a small store so that neither split is empty.

        Args:
            shares: `share` of every sample.
        """
        if len(set(shares)) > 1 and self.fraction:
            low, high = min(shares), max(shares)
            self.threshold = min(max(self.threshold, math.nextafter(low, 1)), high)

    def share(self, condition_NC: np.ndarray) -> float:
        """Return a number in [0, 1) that equal patch tokens share, whatever else differs.

        Args:
            condition_NC: Condition tokens; a CLS token does not count, nor does more than fp16.
        """
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(condition_NC[-self.patches :], np.float16)
        digest = hashlib.sha256(str(self.seed).encode())
        digest.update(stored.data)
        return int.from_bytes(digest.digest()[:6], "big") / 2**48

    def __call__(self, file: int, row: int, condition_NC: np.ndarray) -> str:
        """Return the split of one sample."""
        if self.rule == "hash":
            held = self.share(condition_NC) < self.threshold
        else:
            held = row in self.held_rows if self.held_rows else file in self.held_files
        return "validation" if held else "train"
