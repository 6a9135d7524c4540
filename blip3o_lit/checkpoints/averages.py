"""Averages of a run's weights of any width, made after training from those that the run stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_lit.checkpoints.snapshots import Snapshot, damaged, snapshots_of
from blip3o_lit.checkpoints.weights import folder_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.optimizer import check_width
from blip3o_lit.models.power_average import Fit, fit

MOST_MISSED = 0.2
"""Share of a profile that the stored averages may miss: beyond, it would be another one."""


@dataclass(frozen=True)
class Average:
    """Weights of one width."""

    network: dict[str, Tensor]
    """By a translator's names, fp32."""
    facts: dict[str, Any]
    """Its width, what the fit misses of its profile, and of how many stored averages it is made."""

    def put(
        self, facts: dict[str, Any], state: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the facts and the state of a translator that has these weights."""
        return facts | {"average": self.facts}, state | self.network


def averages(file: Path, facts: dict[str, Any], widths: list[float]) -> dict[float, Average]:
    """Return averages of a run at a checkpoint's step, by width.

    Each stored file is read once, a parameter at a time, for all widths.

    Raises:
        UserError: If the run stored none, or none that make up a width.
    """
    from blip3o_lit.checkpoints import files as checkpointing

    for width in widths:
        check_width("ema", width)
    kept = facts["config"].get("optimizer", {}).get("ema_profiles") or []
    if file.suffix == ".safetensors":
        raise UserError(f"ema: {file} holds one average alone: give the run directory as ckpt")
    if not kept:
        raise UserError(
            f"ema: the run of {file} stored no averages: train with optimizer.ema_profiles=[0.05,"
            "0.1]"
        )
    step = int(facts["step"])
    stored = snapshots_of(folder_of(file), step)
    sources = [(width, step) for width in kept]
    sources += [(width, one.step) for one in stored for width in one.widths]
    fits = [fit([w for w, _ in sources], [s for _, s in sources], width, step) for width in widths]
    for width, found in zip(widths, fits):
        if found.missed > MOST_MISSED:
            raise UserError(
                f"ema: the stored averages (widths {', '.join(f'{one:g}' for one in kept)}, "
                f"{len(sources)} in all) give width {width:g} to {found.missed:.0%} only: choose "
                "one nearer to them"
            )
    own = checkpointing.load(file, without_optimizer=True)["state_dict"]
    sums = _sums(own, stored, len(kept), fits)
    return {
        width: Average(
            network,
            {"width": width, "missed": found.missed, "stored": len(sources)},
        )
        for width, found, network in zip(widths, fits, sums)
    }


def _sums(
    own: dict[str, Tensor], stored: list[Snapshot], count: int, fits: list[Fit]
) -> list[dict[str, Tensor]]:
    """Return the fits' sums over a checkpoint's own averages and the stored ones."""
    names = [name.removeprefix("ema.") for name in own if name.startswith("ema.")]
    sums: list[dict[str, Tensor]] = [{} for _ in fits]
    coefficients_FK = np.stack([found.coefficients_K for found in fits])

    def add(number: int, name: str, tensor: Tensor) -> None:
        tensor = tensor.float()
        for sum_, coefficients_K in zip(sums, coefficients_FK):
            key, weight = f"network.{name}", float(coefficients_K[number])
            sum_[key] = tensor * weight if key not in sum_ else sum_[key].add_(tensor, alpha=weight)

    for number in range(count):
        for name in names:
            tensor = own.get(f"profiles.{number}.{name}")
            if tensor is not None:
                add(number, name, tensor)
    number = count
    for snapshot in stored:
        try:
            with safe_open(snapshot.file, "pt") as opened:
                for place in range(len(snapshot.widths)):
                    for name in opened.keys():  # noqa: SIM118
                        if name.startswith(f"{place}."):
                            key = name.partition(".")[2]
                            add(number, key, opened.get_tensor(name))
                    number += 1
        except SafetensorError as error:
            raise damaged(snapshot.file) from error
    for sum_ in sums:
        for name, tensor in sum_.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"ema: {name} is not finite in the averages that the run stored")
    return sums
