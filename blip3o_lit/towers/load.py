"""From a tower's configuration to the tower, whatever its kind.

Each kind's module is imported when it is first used, so the demo needs neither open_clip's model
list nor the hub.
"""

import torch

from blip3o_lit.config import registry as register
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TRANSFORMERS, TowerConfig
from blip3o_lit.towers.tower import Tower

RANDOM_SEED = 0
"""Seed of random weights (`towers.pretrained=false`)."""


def load_tower(config: TowerConfig, pretrained: bool = True, device: str = "cpu") -> Tower:
    """Build a tower: frozen, in evaluation mode, in the configured precision, on a device.

    Args:
        config: The tower.
        pretrained: False for random weights with a fixed seed; nothing is downloaded then, unless
            only the hub knows the architecture.
        device: Where its weights go. `meta` builds the shapes alone, reads no weights and costs no
            memory: enough for `tower.info` and the number of parameters.

    Raises:
        UserError: If the model or its weights do not exist, cannot be reached or do not fit.
    """
    own = register.tower.own(config.kind)
    if config.model is None and config.kind not in ("demo", *TRANSFORMERS) and own is None:
        raise UserError(f"a tower of kind={config.kind} needs a model: set towers.*.model")
    folder_or_hub = (config.model or "").startswith(("local-dir:", "hf-hub:"))
    brings_weights = folder_or_hub or config.kind == "demo"
    pretrained = pretrained and (brings_weights or config.pretrained is not None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        tower = _load(config, pretrained, device)
    return tower.eval().requires_grad_(False)


def _load(config: TowerConfig, pretrained: bool, device: str) -> Tower:
    if config.kind == "demo":
        from blip3o_lit.towers import demo

        return demo.load(config.model or "", pretrained and device != "meta").to(device)
    own = register.tower.own(config.kind)
    if own is not None:
        return own.build(config, pretrained, device)
    if config.kind == "open_clip":
        from blip3o_lit.towers.open_clip_tower import load_open_clip as load
    elif config.kind == "timm":
        from blip3o_lit.towers.timm_tower import load_timm as load
    elif config.kind in TRANSFORMERS:
        from blip3o_lit.towers.transformers_tower import load_transformers as load
    else:
        from blip3o_lit.towers.eva_clip import load_eva_clip as load
    return load(config, pretrained, device)
