"""Figures of one array over a store: range, mean, spread, token norms, channels out of line.

Shape suffixes: B samples, N tokens, C channels, P text width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_lit.inspection.finding import Finding
from blip3o_lit.tokens.index import ArraySpec
from blip3o_lit.tokens.statistics import TokenMoments

OUTLIER = 10.0
"""Channels whose spread is this many times the median channel's are named."""
NAMED = 5
HEADER = ["array", "shape", "stored", "min", "max", "mean", "std", "token norm", "CLS norm"]


class Norms:
    """Running mean and standard deviation of token norms."""

    def __init__(self) -> None:
        """Start empty."""
        self.count, self.total, self.squares, self.zeros = 0, 0.0, 0.0, 0

    def add(self, norms: Tensor) -> None:
        """Count a batch of norms."""
        norms = norms.double()
        self.count += norms.numel()
        self.total += float(norms.sum())
        self.squares += float(norms.square().sum())
        self.zeros += int((norms == 0).sum())

    def __str__(self) -> str:
        """Return mean +- standard deviation."""
        if not self.count:
            return "-"
        mean = self.total / self.count
        spread = math.sqrt(max(self.squares / self.count - mean * mean, 0.0))
        return f"{mean:.3f} +- {spread:.3f}"


class ArrayNumbers:
    """Everything that is counted of one array."""

    def __init__(self, spec: ArraySpec) -> None:
        """Start empty."""
        self.spec = spec
        self.moments: TokenMoments | None = None
        self.patch_norms, self.cls_norms = Norms(), Norms()
        self.low, self.high = math.inf, -math.inf

    def add(self, numbers: Tensor) -> None:
        """Count a batch `[B, N, C]` (or `[B, P]`) of finite fp32 numbers."""
        tokens_BNC = numbers if numbers.ndim == 3 else numbers[:, None]  # noqa: PLR2004
        self.low = min(self.low, float(tokens_BNC.min()))
        self.high = max(self.high, float(tokens_BNC.max()))
        moments = TokenMoments.of(tokens_BNC, self.spec.cls)
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        norms_BN = tokens_BNC.norm(dim=-1)
        if self.spec.cls:
            self.cls_norms.add(norms_BN[:, 0])
        self.patch_norms.add(norms_BN[:, int(self.spec.cls) :])

    def row(self, name: str) -> list[str]:
        """Return the figures of the table with `HEADER`."""
        shape = "x".join(str(side) for side in self.spec.shape)
        head = [name, shape, self.spec.dtype]
        if self.moments is None:
            return head + ["-"] * (len(HEADER) - len(head))
        patch = self.moments.patch
        mean = float(patch.mean_C.mean())
        within = patch.m2_C / patch.count + patch.mean_C.square()
        spread = math.sqrt(max(float(within.mean()) - mean * mean, 0.0))
        figures = [f"{value:.4g}" for value in (self.low, self.high, mean, spread)]
        return [*head, *figures, str(self.patch_norms), str(self.cls_norms)]

    def findings(self, name: str) -> Iterator[Finding]:
        """Yield what is remarkable."""
        zeros = self.patch_norms.zeros + self.cls_norms.zeros
        if zeros:
            says = f"{zeros} tokens of {name} are all zero: they have no cosine"
            yield Finding("warn", "numbers", says, "look at their images")
        if self.spec.kind == "text":
            if self.patch_norms.count and not 0.99 < self._mean_norm() < 1.01:  # noqa: PLR2004
                yield Finding("warn", name, f"mean norm {self._mean_norm():.3f}, 1 is due")
            return
        if self.moments is None:
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

    def _mean_norm(self) -> float:
        return self.patch_norms.total / self.patch_norms.count
