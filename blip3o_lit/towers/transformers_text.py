"""Text encoders of transformers as text towers: CLIP's and SigLIP's text sides, and T5 encoders.

From a local folder or the hub: `config.json`, `model.safetensors` (or shards of it) and, where the
vocabulary is not CLIP's, the tokenizer's files. Shape suffixes: B captions, L positions.
"""

from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    Siglip2TextModel,
    SiglipTextModel,
)

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import DTYPES
from blip3o_lit.towers.refusals import first_line
from blip3o_lit.towers.text_tower import TextInfo, TextTower
from blip3o_lit.towers.transformers_folder import (
    UNREADABLE,
    clip_settings,
    random_network,
    read_network,
    read_settings,
)
from blip3o_lit.towers.transformers_tower import CLIP_WORDS

TWO_SIDED = ("clip", "siglip", "siglip2")
ONE_SIDED = {
    "clip_text_model": CLIPTextModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2_text_model": Siglip2TextModel,
}
T5 = ("t5", "mt5", "umt5")
LONGEST = 512
"""Most word pieces of a T5, which has no table of positions: what it was trained with."""


class TransformersText(TextTower):
    """The states that these models call `last_hidden_state`, which their final norm has passed."""

    def __init__(self, network: Any, settings: Any, source: str, name: str) -> None:
        super().__init__()
        self.network = network
        self.is_t5 = settings.model_type in T5
        self.is_clip = settings.model_type.startswith("clip")
        text = getattr(settings, "text_config", settings)
        longest = LONGEST if self.is_t5 else text.max_position_embeddings
        width = text.d_model if self.is_t5 else text.hidden_size
        self.info = TextInfo(f"huggingface:{name}, text", width, longest)
        self.words: Any = None
        if not (self.is_clip and text.vocab_size == CLIP_WORDS):
            self.words = _tokenizer(source, text.vocab_size)

    def padded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        if self.words is None:
            numbers_BL = SimpleTokenizer(context_length=self.info.longest)(captions)
            length_B = numbers_BL.argmax(1) + 1
            mask_BL = None
        else:
            # A T5 leaves padding out; SigLIP has learnt with it, at full length.
            encoded = self.words(
                captions,
                padding=True if self.is_t5 else "max_length",
                max_length=self.info.longest,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            numbers_BL, mask_BL = encoded["input_ids"], encoded["attention_mask"]
            length_B = mask_BL.sum(1)
            mask_BL = mask_BL.to(self.device) if self.is_t5 or self.is_clip else None
        out = self.network(input_ids=numbers_BL.to(self.device), attention_mask=mask_BL)
        return out.last_hidden_state, length_B


def _tokenizer(source: str, vocabulary: int) -> Any:
    try:
        words = AutoTokenizer.from_pretrained(
            str(Path(source).expanduser()), trust_remote_code=False, use_fast=True
        )
    except UNREADABLE as error:
        raise UserError(f"{source}: its tokenizer can't be read: {first_line(error)}") from error
    if words.pad_token_id is None or words.padding_side != "right":
        raise UserError(f"{source}: its tokenizer does not pad on the right")
    if len(words) > vocabulary:
        raise UserError(f"{source}: its tokenizer has {len(words)} words, the model {vocabulary}")
    return words


def load_transformers_text(config: TowerConfig, pretrained: bool, device: str) -> TransformersText:
    """Build a text tower from a folder or hub id, or the shapes of a CLIP of open_clip by name."""
    source, model = config.pretrained, config.model
    load = pretrained and device != "meta" and source is not None
    if not (source or model):
        raise UserError("towers.text.kind=transformers needs towers.text.pretrained=FOLDER")
    settings = (
        read_settings(source) if source and (load or not model) else clip_settings(str(model))
    )
    kind = settings.model_type
    if kind not in (*TWO_SIDED, *ONE_SIDED, *T5):
        known = "CLIP, SigLIP and T5 encoders"
        raise UserError(f"{source}: a {kind} is no text tower that is known: {known}")
    dtype = DTYPES[config.precision]
    own = AutoModelForTextEncoding if kind in T5 else ONE_SIDED.get(kind, AutoModel)
    if load:
        network = read_network(str(source), settings, dtype, own)
    else:
        network = random_network(settings, dtype, device, own)
    network = network.text_model if kind in TWO_SIDED else network
    label = str(source).rstrip("/").split("/")[-1] if source else ""
    label = label if pretrained else f"{model or label}/random"
    label = label if config.precision == "fp32" else f"{label}, {config.precision}"
    return TransformersText(network, settings, str(source), label).to(torch.device(device))
