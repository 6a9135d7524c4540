"""The text side of the demo's CLIP: a causal transformer over whole words, with an end word."""

from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers import demo
from blip3o_lit.towers.open_clip_text import normed_states
from blip3o_lit.towers.scenes import WORDS
from blip3o_lit.towers.text_tower import TextInfo, TextTower


class DemoText(TextTower):
    """States of the demo's captions."""

    def __init__(self, tower: demo.DemoClip) -> None:
        super().__init__()
        self.model = tower.model
        del self.model.visual
        self.info = TextInfo(
            f"{tower.info.name}, text", demo.TEXT.width, int(demo.TEXT.context_length or 0)
        )

    def check(self, captions: list[str]) -> None:
        for caption in captions:
            unknown = [word for word in demo.words_of(caption) if word not in WORDS]
            if unknown:
                raise UserError(
                    f"{caption!r}: the demo's text tower has no word for {', '.join(unknown)}; it "
                    f"knows {' '.join(WORDS)}, as in: a red seven at the top left"
                )

    def padded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        numbers_BL = demo.tokenize(captions).to(self.device)
        return normed_states(self.model, numbers_BL), numbers_BL.argmax(1) + 1


def load_demo_text(config: TowerConfig, pretrained: bool, device: str) -> DemoText:
    tower = demo.load("clip", pretrained and device != "meta")
    assert isinstance(tower, demo.DemoClip)
    return DemoText(tower).to(device)
