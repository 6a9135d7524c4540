"""Signs of a run that does not learn: each warning names the likely cause and an override to try.

They are what users of the seeds were told to look for by eye: a falling loss, a rising velocity
cosine, norm ratios near 1 and sane scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

WINDOW = 5
"""Logged rows that are averaged for a comparison."""
LIMITS = 0.12, 8.0
"""Where the adaptive scale, an average that is clamped to 0.1 and 10, has as good as arrived."""
PATIENCE_ROWS = 20
"""Logged rows before flatness counts: the warm-up is over by then."""


class RunHealth:
    """Watches the logged rows of one run; each warning is given once."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._cosines: list[float] = []
        self._told: set[str] = set()

    def observe(self, row: dict[str, float]) -> list[str]:
        """Take one logged row and return the warnings that it gives rise to."""
        signs = dict(self._signs(row))
        new = [text for name, text in signs.items() if name not in self._told]
        self._told |= signs.keys()
        return new

    def _signs(self, row: dict[str, float]) -> Iterator[tuple[str, str]]:
        loss = row["train/loss"]
        if not math.isfinite(loss):
            cause = "numbers overflow or diverge; try optimizer.lr a third as large, or "
            yield "nan", f"the loss is {loss}: {cause}precision=fp32 to see whether it is that"
            return
        self._losses.append(loss)
        if len(self._losses) == PATIENCE_ROWS:
            first, last = _ends(self._losses)
            if last > 0.98 * first:
                yield (
                    "loss",
                    f"the loss does not fall ({first:.4g} at first, {last:.4g} now): the "
                    "learning rate may be too high or too low; try optimizer.lr=3e-4, and look "
                    "at the tokens with `python -m blip3o_lit.doctor tokens=DIR`",
                )
        if "train/velocity_cosine" in row:
            self._cosines.append(row["train/velocity_cosine"])
            if len(self._cosines) == PATIENCE_ROWS:
                first, last = _ends(self._cosines)
                if last < first + 0.01 and last < 0.9:
                    yield (
                        "velocity",
                        f"the velocity cosine stays at {last:.3f}: the network may be narrower "
                        "than the target, which flow.prediction=velocity cannot afford; try "
                        "flow.prediction=sample",
                    )
        ratio = row.get("train/norm_ratio", 1.0)
        if len(self._losses) >= PATIENCE_ROWS and not 0.2 < ratio < 2:
            text = f"outputs are {ratio:.2g} times as long as targets: a scale does not fit; "
            yield "norm", text + "try flow.output_scale=1 flow.velocity_scale=1"
        scale = row.get("train/adaptive_scale", 1.0)
        if not LIMITS[0] < scale < LIMITS[1]:
            text = f"the adaptive scale is {scale:.2g}, near its limit: "
            yield "scale", text + "try flow.adaptive_scale=false flow.output_scale=1"


def _ends(values: list[float]) -> tuple[float, float]:
    """Return the means of the first and the last few values."""
    first, last = values[:WINDOW], values[-WINDOW:]
    return sum(first) / len(first), sum(last) / len(last)
