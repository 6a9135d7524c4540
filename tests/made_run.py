"""A run directory with an untrained but lively network, made by the training code itself."""

from __future__ import annotations

from pathlib import Path

import torch

from blip3o_lit.budget.machine import this_machine
from blip3o_lit.budget.plan import make_plan
from blip3o_lit.config.data import DataConfig, LinearGaussianConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import PrecisionConfig, TrainerConfig
from blip3o_lit.testbeds.linear_gaussian import linear_gaussian_store
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.training.module import TranslationModule

PROBLEM = LinearGaussianConfig(images=256, validation_images=48, condition_width=6, target_width=4)


def small_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(width=16, depth=1, heads=2, kv_heads=1, mlp_width=16),
        data=DataConfig(name="linear_gaussian", linear_gaussian=PROBLEM),
        mode=ModeConfig("patch_only"),
        precision=PrecisionConfig("fp32"),
        trainer=TrainerConfig(max_steps=30),
        batch_size=16,
    )


def make_run(folder: Path, store: Path | None = None, config: TrainConfig | None = None) -> Path:
    """Write a run directory whose checkpoint holds random weights; its store is built too.

    BLIP3O_HOME must point at a scratch folder.
    """
    config = config or small_config()
    path = store or linear_gaussian_store(PROBLEM)
    data = TokenDataModule(config.data, config.mode, path, config.seed, config.batch_size)
    data.open()
    module = TranslationModule(make_plan(config, data, 30, this_machine("cpu")), data)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network, size in ((module.network, 0.5), (module.ema, 0.2)):
            for weight in network.parameters():
                weight.copy_(size * torch.randn(weight.shape, generator=draw))
    checkpoint = {"state_dict": module.state_dict(), "global_step": 30}
    module.on_save_checkpoint(checkpoint)
    checkpoint["blip3o"]["step"] = 30  # no trainer, so the module counted none
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder
