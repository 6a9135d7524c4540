"""A pretrained token decoder in place of the linear read-out: diffusers' `AutoencoderRAE`.

Representation Autoencoders (Zheng et al. 2025, arXiv:2510.11690) pair a frozen encoder with a ViT
that turns its tokens back into pixels. Only that half is built and read, from safetensors alone.

Shape suffixes: B images, N tokens (CLS first where there is one), C token width, H and W pixels.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import ArraySpec
from blip3o_lit.towers.weight_files import assign, find, first_line, read, weight_files

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALES = ("encoder_mean", "encoder_std")
"""What turns the network's output into pixels in 0..1."""
EPSILON = {"dinov2": 1e-6, "siglip2": 1e-6, "mae": 1e-12}
"""Of each encoder's final norm, as transformers has it; it has no weights in these autoencoders."""
NAMES = {"dinov2": ("dinov2", "reg"), "siglip2": ("siglip2",), "mae": ("mae",)}
"""What a tower's name holds that is the encoder: these DINOv2 have registers."""


class TokenDecoder(nn.Module):
    """Draws the tokens of one encoder by diffusers' `RAEDecoder`, without their CLS token.

    `epsilon` is of the encoder's final norm; the network's pixels times std plus mean are in 0..1.
    """

    mean_1311: Tensor
    std_1311: Tensor

    def __init__(
        self, network: nn.Module, cls: bool, epsilon: float, mean_3: Tensor, std_3: Tensor
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.cls, self.epsilon = cls, epsilon
        self.register_buffer("mean_1311", mean_3.float().reshape(1, 3, 1, 1))
        self.register_buffer("std_1311", std_3.float().reshape(1, 3, 1, 1))

    @torch.inference_mode()
    def draw(self, tokens_BNC: Tensor) -> Tensor:
        patches = tokens_BNC[:, int(self.cls) :].to(self.mean_1311)
        normed = F.layer_norm(patches, patches.shape[-1:], eps=self.epsilon)
        pixels = self.network.unpatchify(self.network(normed).logits)
        return (pixels * self.std_1311 + self.mean_1311).clamp(0, 1)


def load_decoder(source: str, spec: ArraySpec, shape: TokenShape) -> TokenDecoder:
    """Read the decoder of a folder or hub id, refused where it does not fit the target tokens.

    `spec` says whose tokens they are, `shape` which of them the mode in use has.
    """
    config = _config(source)
    _check(source, config, spec, shape)
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
        from diffusers.models.embeddings import get_2d_sincos_pos_embed
    except ImportError as error:
        raise UserError(
            f"decoder={source} needs a package: pip install 'blip3o-lit[decoder]'"
        ) from error
    width, hidden = config["encoder_hidden_size"], config["decoder_hidden_size"]
    grid = shape.grid[0]
    with torch.device("meta"):
        network = RAEDecoder(
            hidden_size=width,
            decoder_hidden_size=hidden,
            decoder_num_hidden_layers=config["decoder_num_hidden_layers"],
            decoder_num_attention_heads=config["decoder_num_attention_heads"],
            decoder_intermediate_size=config["decoder_intermediate_size"],
            num_patches=shape.patches,
            patch_size=config["patch_size"],
            image_size=grid * config["patch_size"],
        )
    try:
        files = weight_files(source, _wanted, (WEIGHTS,), (f"{WEIGHTS}.index.json",))
    except UserError as error:
        raise UserError(
            f"decoder={error}; pickled weights are not read: save it anew with "
            "AutoencoderRAE.save_pretrained"
        ) from error
    tensors = dict(read(files, _wanted))
    scales = [tensors.pop(name) for name in SCALES if name in tensors]
    if len(scales) < len(SCALES):
        raise UserError(f"decoder={source}: its weights lack {' or '.join(SCALES)}")
    weights = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    assign(network, weights, f"decoder={source}", f"its own {CONFIG}")
    # Computed, not stored: on the meta device it has no numbers.
    network.decoder_pos_embed = (
        get_2d_sincos_pos_embed(hidden, grid, cls_token=True, extra_tokens=1, output_type="pt")
        .unsqueeze(0)
        .float()
    )
    decoder = TokenDecoder(network, shape.cls, EPSILON[config["encoder_type"]], *scales)
    return decoder.float().eval().requires_grad_(False)


def _config(source: str) -> dict[str, Any]:
    """Read config.json, with diffusers' defaults where it is silent."""
    file = find(source, CONFIG)
    if file is None:
        raise UserError(f"decoder={source} has no {CONFIG}, or the hub cannot be reached")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"decoder={source}: its {CONFIG} is damaged: {first_line(error)}"
        ) from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderRAE":
        raise UserError(
            f"decoder={source} is a {name}, not an AutoencoderRAE of diffusers: give one of "
            "docs/decoders.md"
        )
    defaults = {
        "encoder_type": "dinov2",
        "encoder_hidden_size": 768,
        "encoder_patch_size": 14,
        "encoder_input_size": 224,
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 8,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 2048,
        "patch_size": 16,
    }
    config = {**defaults, **config}
    if config["encoder_type"] not in NAMES:
        raise UserError(f"decoder={source}: encoder {config['encoder_type']} is not known")
    return config


def _check(source: str, config: dict[str, Any], spec: ArraySpec, shape: TokenShape) -> None:
    """Refuse a decoder whose encoder did not make these tokens, naming the first difference."""
    family, size = config["encoder_type"], config["encoder_input_size"]
    side = size // config["encoder_patch_size"]
    named = f"decoder={source} draws tokens of {family}"
    if not all(word in spec.tower.lower() for word in NAMES[family]):
        with_registers = " with registers" if family == "dinov2" else ""
        raise UserError(f"{named}{with_registers}; these are of {spec.tower}")
    if shape.width != config["encoder_hidden_size"]:
        raise UserError(
            f"{named} that are {config['encoder_hidden_size']} wide; these are {shape.width}"
        )
    if shape.grid != (side, side):
        rows, columns = shape.grid
        raise UserError(f"{named} in a {side}x{side} grid; these have {rows}x{columns}")
    if spec.preprocessing.get("size", size) != size:
        raise UserError(f"{named} at {size} px; these are at {spec.preprocessing['size']} px")
    if spec.layer != -1 or spec.normed or spec.projected:
        raise UserError(
            f"{named} as the last block gives them: extract with towers.target.layer=-1 "
            "towers.target.norm=false, and leave mode.projected=false"
        )


def _wanted(name: str) -> bool:
    own = name.startswith("decoder.") and name != "decoder.decoder_pos_embed"
    return own or name in SCALES
