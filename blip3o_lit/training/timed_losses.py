"""The validation loss at fixed times, with the same noise each time: a curve that can be compared.

The training loss draws its times anew at each step, and its mean hides where on the path the
network learns. Shape suffixes: B images, N target tokens, D target width, T times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from blip3o_lit.translation.translator import Translator

SEED = 0


class TimedLosses(Metric):
    """Squared error of the network's output in the middle of equal bins of t.

    It is in units of the unscaled output, without weights and further terms, as `evaluate` has it.
    """

    full_state_update = False
    total_T: Tensor
    images: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.times = [(number + 0.5) / bins for number in range(bins)]
        zeros = torch.zeros(bins, dtype=torch.float64)
        self.add_state("total_T", zeros, dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, translator: Translator, batch: dict[str, Tensor], counted_B: Tensor) -> None:
        """Add a batch of raw tokens; what is not counted takes part all the same."""
        counted_B = counted_B.to(batch["target"].device)
        tokens = (batch["condition"], batch["target"], batch["sample"])
        for number, terms in enumerate(translator.losses_at(self.times, *tokens, SEED)):
            self.total_T[number] += terms.mse_B.double()[counted_B].sum()
        self.images += counted_B.sum()

    def compute(self) -> dict[str, float]:
        """Return `timed_loss`, the mean over the times, and `timed_loss_tTIME` of each."""
        losses = (self.total_T / self.images).tolist()
        by_time = {f"timed_loss_t{time:.4g}": loss for time, loss in zip(self.times, losses)}
        return {"timed_loss": sum(losses) / len(losses), **by_time}
