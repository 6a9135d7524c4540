"""The two demo towers: small encoders that `scripts/train_demo_towers.py` trains on demo scenes.

Both see 64x64 pixels, so both have a 16x16 grid and a CLS token. Their weights are in `weights/`,
with a card; loading them needs no network.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file
from timm.models.eva import Eva
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.towers.head import TowerHead
from blip3o_lit.towers.scenes import SIZE, WORDS
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.towers.vit import open_clip_tokens, trunk_tokens

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("eva", "clip")
PATCH = 4
PROJECTION = 64
EVA_WIDTH, EVA_DEPTH, EVA_HEADS = 192, 4, 3
VISION = CLIPVisionCfg(layers=5, width=128, head_width=64, patch_size=PATCH, image_size=SIZE)
TEXT = CLIPTextCfg(
    context_length=24, vocab_size=len(WORDS) + 2, width=128, heads=4, layers=2, pool_type="argmax"
)
"""Word 0 is padding; the end word has the highest number, where `argmax` pooling finds it."""
EPSILON = 1e-5
GREY = (127, 127, 127)
"""What covers the right half of a picture: the middle of the pixels' range."""
LOGIT_SCALE = float(np.log(1 / 0.07))
"""Initial log of the inverse softmax temperature (Radford et al. 2021, section 2.5)."""

_NUMBER = {word: number for number, word in enumerate(WORDS, start=1)}
_END = len(WORDS) + 1


def words_of(caption: str) -> list[str]:
    """Split a caption into words; a comma is one."""
    return caption.lower().replace(",", " ,").split()


def tokenize(captions: list[str]) -> Tensor:
    """Turn captions into word numbers `[B, L]` int64, closed by the end word, padded with 0.

    Words that no scene has are left out, and long captions are cut.
    """
    numbers_BL = torch.zeros(len(captions), TEXT.context_length, dtype=torch.long)
    for row, caption in enumerate(captions):
        numbers = [_NUMBER[word] for word in words_of(caption) if word in _NUMBER]
        numbers = numbers[: TEXT.context_length - 1] + [_END]
        numbers_BL[row, : len(numbers)] = torch.tensor(numbers)
    return numbers_BL


class DemoTower(Tower):
    """What both demo towers share: the input size and the normalisation of pixels to -1..1."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.info = TowerInfo(
            name=f"demo:{name}",
            shape=TokenShape(grid=(SIZE // PATCH, SIZE // PATCH), cls=True, width=width),
            image_size=SIZE,
            preprocessing={
                "size": SIZE,
                "resize": "squash",
                "interpolation": "bicubic",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
            },
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class DemoEva(DemoTower):
    """EVA-02-style ViT: 64 px, patch 4, rotary positions, SwiGLU, CLS token."""

    def __init__(self) -> None:
        super().__init__("eva", EVA_WIDTH)
        self.trunk = Eva(
            img_size=SIZE,
            patch_size=PATCH,
            num_classes=0,
            global_pool="token",
            embed_dim=EVA_WIDTH,
            depth=EVA_DEPTH,
            num_heads=EVA_HEADS,
            qkv_fused=False,
            mlp_ratio=8 / 3,
            swiglu_mlp=True,
            scale_mlp=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(SIZE // PATCH, SIZE // PATCH),
            norm_layer=partial(nn.LayerNorm, eps=EPSILON),
        )
        self.projection_CP = nn.Parameter(torch.randn(EVA_WIDTH, PROJECTION) * EVA_WIDTH**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        return trunk_tokens(self.trunk, images_B3SS, EVA_DEPTH - 1, cls=True)

    def project(self, tokens_BC: Tensor) -> Tensor:
        """Put tokens through the final norm and the projection; returns `[B, P]`."""
        return self.trunk.norm(tokens_BC) @ self.projection_CP

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return TowerHead(self.trunk.norm, self.projection_CP, self.logit_scale).describe()


class DemoClip(DemoTower):
    """CLIP: a ViT of 64 px and patch 4, and a causal text transformer over whole words."""

    def __init__(self) -> None:
        super().__init__("clip", VISION.width)
        self.model = CLIP(PROJECTION, VISION, TEXT)

    @property
    def _visual(self) -> Any:
        return self.model.visual

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        last = len(self._visual.transformer.resblocks) - 1
        return open_clip_tokens(self._visual, images_B3SS, last)

    def project(self, tokens_BC: Tensor) -> Tensor:
        """Put tokens through the final norm and the projection; returns `[B, P]`."""
        return self._visual.ln_post(tokens_BC) @ self._visual.proj

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        visual = self._visual
        return TowerHead(visual.ln_post, visual.proj, self.model.logit_scale).describe()

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor:
        numbers_BL = tokenize(captions).to(self.device)
        return self.model.encode_text(numbers_BL, normalize=True)


class LeftHalf(Tower):
    """A tower behind a screen over the right half of every picture, which it leaves open."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.info = replace(
            tower.info,
            name=f"{tower.info.name}, left half",
            preprocessing={**tower.info.preprocessing, "visible": "left half"},
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        covered = image.convert("RGB")
        covered.paste(GREY, (covered.width // 2, 0, covered.width, covered.height))
        return self.tower.preprocess(covered)

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        return self.tower.tokens(images_B3SS)

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.tower.heads()


def load(name: str, pretrained: bool = True) -> DemoTower:
    """Build a demo tower, frozen, with this repository's weights or random ones of a fixed seed."""
    one_of("demo tower", name, NAMES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = DemoEva() if name == "eva" else DemoClip()
    if pretrained:
        path = WEIGHTS / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{path.name} is missing: run scripts/train_demo_towers.py")
        tower.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return tower.eval().requires_grad_(False)
