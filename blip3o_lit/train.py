"""Train a translator: `python -m blip3o_lit.train model=base mode=patch_only`."""

from __future__ import annotations

from blip3o_lit.command import run_command
from blip3o_lit.config.train import TrainConfig


def train(config: TrainConfig) -> float | None:
    """Run one training job and return its best held-out cosine."""
    from blip3o_lit.training import run_training

    return run_training(config)


def main() -> None:
    """Entry point of `blip3o-train`."""
    run_command("train", TrainConfig, train)


if __name__ == "__main__":
    main()
