"""A small random token decoder, saved as diffusers saves one, and tokens that it draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderRAE

from blip3o_lit.tokens.store.index import ArraySpec

TOWERS = {
    "dinov2": "huggingface:dinov2-with-registers-base",
    "siglip2": "huggingface:siglip2-base-patch16-256",
}


def saved(folder: Path, family: str = "dinov2", **save: object) -> AutoencoderRAE:
    """Save a small random autoencoder whose every tensor differs from its default."""
    torch.manual_seed(0)
    model = AutoencoderRAE(
        encoder_type="dinov2",
        encoder_hidden_size=64,
        encoder_patch_size=14,
        encoder_num_hidden_layers=1,
        encoder_input_size=56,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=80,
        patch_size=8,
        encoder_norm_mean=[0.4, 0.5, 0.6],
        encoder_norm_std=[0.2, 0.3, 0.1],
        latents_mean=torch.randn(64, 1, 1).tolist(),
        latents_std=torch.rand(64, 1, 1).add(0.5).tolist(),
        noise_tau=0.8,
        scaling_factor=2.0,
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder, **save)
    # Only the encoder half differs, and diffusers can't build SigLIP's with every transformers.
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_type": family}))
    return model


def spec(family: str = "dinov2", **changes: object) -> ArraySpec:
    array = ArraySpec("tokens", "float16", (17, 64), cls=True, grid=(4, 4), tower=TOWERS[family])
    return replace(array, **changes)
