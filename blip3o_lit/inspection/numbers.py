"""Figures of one array over a store: range, mean, spread, token norms, channels out of line.

Shape suffixes: B samples, N tokens, C channels, P text width.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.inspection.finding import Finding
from blip3o_lit.tokens.statistics import ChannelMoments, TokenMoments
from blip3o_lit.tokens.store.index import ArraySpec

OUTLIER = 10.0
"""Channels whose spread is this many times the median channel's are named."""
NAMED = 5
HEADER = ["array", "shape", "stored", "min", "max", "mean", "std", "token norm", "CLS norm"]


class ArrayNumbers:
    """Everything that is counted of one array."""

    def __init__(self, spec: ArraySpec) -> None:
        self.spec = spec
        self.moments: TokenMoments | None = None
        self.norms: TokenMoments | None = None
        self.zeros = 0
        self.low, self.high = math.inf, -math.inf

    def add(self, numbers: Tensor) -> None:
        """Count a batch `[B, N, C]` (or `[B, P]`) of finite fp32 numbers."""
        tokens_BNC = numbers if numbers.ndim == 3 else numbers[:, None]
        self.low = min(self.low, float(tokens_BNC.min()))
        self.high = max(self.high, float(tokens_BNC.max()))
        norms_BN1 = tokens_BNC.norm(dim=-1, keepdim=True)
        self.zeros += int((norms_BN1 == 0).sum())
        moments = TokenMoments.of(tokens_BNC, self.spec.cls)
        norms = TokenMoments.of(norms_BN1, self.spec.cls)
        self.moments = self.moments.merge(moments) if self.moments else moments
        self.norms = self.norms.merge(norms) if self.norms else norms

    def row(self, name: str) -> list[str]:
        """Return the cells of a table row under `HEADER`."""
        head = [name, "x".join(str(side) for side in self.spec.shape), self.spec.dtype]
        if self.moments is None or self.norms is None:
            return head + ["-"] * (len(HEADER) - len(head))
        patch = self.moments.patch
        mean = float(patch.mean_C.mean())
        square = patch.m2_C / patch.count + patch.mean_C.square()
        std = math.sqrt(max(float(square.mean()) - mean * mean, 0.0))
        figures = [f"{value:.4g}" for value in (self.low, self.high, mean, std)]
        return [*head, *figures, _mean_and_std(self.norms.patch), _mean_and_std(self.norms.cls)]

    def findings(self, name: str) -> Iterator[Finding]:
        if self.moments is None or self.norms is None:
            return
        if self.zeros:
            says = f"{self.zeros} tokens of {name} are all zero: they have no cosine"
            yield Finding("warn", "numbers", says, "look at their images")
        if self.spec.kind == "text":
            norm = float(self.norms.patch.mean_C)
            if not 0.99 < norm < 1.01:
                yield Finding("warn", name, f"mean norm {norm:.3f}, 1 is due")
            return
        patch = self.moments.patch
        std_C = (patch.m2_C / patch.count).clamp_min(0).sqrt()
        median = float(std_C.median())
        dead = int((std_C == 0).sum())
        if dead and patch.count > 1:
            says = f"{dead} of {len(std_C)} channels never change"
            yield Finding("warn", f"channels of {name}", says, "check the tower's weights")
        order = torch.argsort(std_C, descending=True)[:NAMED].tolist()
        far = [c for c in order if median > 0 and std_C[c] > OUTLIER * median]
        if far:
            named = ", ".join(f"{c} ({float(std_C[c]) / median:.0f}x)" for c in far)
            says = f"spread of the largest, in medians: {named}"
        else:
            says = f"none spreads over {OUTLIER:.0f} times the median channel"
        yield Finding("ok", f"channels of {name}", says)


class CaptionLengths:
    """How many captions the images have, and how long these are."""

    def __init__(self) -> None:
        self.captions = self.tokens = self.longest = self.without = 0

    def add(self, lengths_SK: np.ndarray) -> None:
        """Count the lengths of some images' captions, 0 behind the last of each."""
        self.captions += int((lengths_SK > 0).sum())
        self.tokens += int(lengths_SK.sum())
        self.longest = max(self.longest, int(lengths_SK.max(initial=0)))
        self.without += int((lengths_SK.sum(1) == 0).sum())

    def findings(self, name: str, most: int) -> Iterator[Finding]:
        if self.without:
            says = f"{self.without} images have no {name}: they train without a condition of them"
            yield Finding("warn", "empty captions", says, "drop them, or caption them")
        mean = self.tokens / max(self.captions, 1)
        says = (
            f"{self.captions:,} captions, {mean:.1f} tokens on average, {self.longest} in the "
            f"longest of {most} that may come"
        )
        yield Finding("ok", f"lengths of {name}", says)


def _mean_and_std(norms: ChannelMoments | None) -> str:
    if norms is None:
        return "-"
    std = math.sqrt(max(float(norms.m2_C) / norms.count, 0.0))
    return f"{float(norms.mean_C):.3f} +- {std:.3f}"
