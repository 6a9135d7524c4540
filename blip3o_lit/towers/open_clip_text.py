"""The text side of an open_clip model as a text tower: CLIP's causal ones, and SigLIP's."""

from typing import Any

import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import DTYPES
from blip3o_lit.towers.hook import output_of
from blip3o_lit.towers.open_clip_tower import create, tokenizer_of
from blip3o_lit.towers.text_tower import TextInfo, TextTower


class OpenClipText(TextTower):
    """States behind `ln_final`; the end word is CLIP's highest number, or the tokenizer's own."""

    def __init__(self, model: Any, name: str, model_name: str) -> None:
        super().__init__()
        side = getattr(model, "text", model)
        norm = getattr(side, "ln_final", None)
        if norm is None or getattr(side, "cls_emb", None) is not None:
            raise UserError(f"{name}: its text side is no plain transformer of open_clip")
        self.model, self.tokenizer = model, tokenizer_of(model_name, name)
        del model.visual
        longest = int(side.context_length)
        self.info = TextInfo(f"{name}, text", int(side.token_embedding.embedding_dim), longest)

    def padded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        numbers_BL = self.tokenizer(captions).to(self.device)
        return normed_states(self.model, numbers_BL), self._lengths(numbers_BL)

    def _lengths(self, numbers_BL: Tensor) -> Tensor:
        words = getattr(self.tokenizer, "tokenizer", None)  # of transformers, around which it is
        if words is None:
            return numbers_BL.argmax(1) + 1
        padding, end = words.pad_token_id, words.eos_token_id
        # Where the end word pads as well, its first one is the caption's.
        length_B = (numbers_BL != padding).sum(1) + int(padding == end)
        return length_B.clamp_max(numbers_BL.shape[1])


def normed_states(model: Any, numbers_BL: Tensor) -> Tensor:
    """Return what the text side of an open_clip model projects `[B, L, E]`, all positions of it."""
    norm = getattr(model, "text", model).ln_final
    return output_of(norm, lambda: model.encode_text(numbers_BL))


def load_open_clip_text(config: TowerConfig, pretrained: bool, device: str) -> OpenClipText:
    if config.model is None:
        raise UserError("towers.text.kind=open_clip needs towers.text.model, as ViT-L-14-quickgelu")
    weights = config.pretrained is not None or ":" in config.model  # a folder brings its own
    model, source = create(config, pretrained and weights, device)
    name = f"open_clip:{source.label}"
    name = name if config.precision == "fp32" else f"{name}, {config.precision}"
    tower = OpenClipText(model, name, source.model)
    return tower.to(torch.device(device), DTYPES[config.precision])
