"""How images become tokens: the pair of frozen encoders, and the pixels that they see."""

from dataclasses import asdict, dataclass, field

from blip3o_lit.config import registry as register
from blip3o_lit.config.checks import above_zero, check_fields, choice
from blip3o_lit.config.errors import UserError, one_of

TRANSFORMERS = ("transformers", "huggingface")
"""Two words for one kind; the second is older."""
TEXT_KINDS = ("demo", "open_clip", *TRANSFORMERS)
"""Kinds of text towers."""


@dataclass
class TowerConfig:
    """One tower: an architecture, its weights and which of its tokens to take."""

    kind: str = choice("demo", register.tower)
    """Who builds it: open_clip, timm, transformers (or its old word, huggingface), eva_clip (ours),
    demo, or one of a package's."""
    model: str | None = None
    """Architecture, for example ViT-L-14-quickgelu; or, with its weights, local-dir:FOLDER or
    hf-hub:ORG/NAME (open_clip)."""
    pretrained: str | None = None
    """Weights: a pretrained tag, a local file or folder, or a hub id; null: random, fixed seed."""
    like: str | None = None
    """Pretrained tag whose preprocessing and activation a local open_clip file shares."""
    layer: int = -1
    """Block whose output the tokens are; -1 is the last, 0 the first."""
    norm: bool = False
    """Apply the tower's final norm to the tokens."""
    image_size: int | None = above_zero(None)
    """Side of the input in pixels where it differs from the model's own (open_clip and timm)."""
    precision: str = choice("fp32", ("fp32", "bf16", "fp16"))
    """Number format of the weights and the forward pass: fp32, bf16 or fp16."""

    def __post_init__(self) -> None:
        check_fields(self, "towers.*.")
        fixed = self.kind in register.tower.built_in and self.kind not in ("open_clip", "timm")
        if self.image_size and fixed:
            raise UserError(
                f"towers.*.image_size={self.image_size}: kind={self.kind} has one size only"
            )
        if self.like and self.kind != "open_clip":
            raise UserError(f"towers.*.like={self.like} is for kind=open_clip, not {self.kind}")
        if self.kind == "demo" and (self.layer != -1 or self.norm or self.precision != "fp32"):
            raise UserError("the demo towers have layer=-1, norm=false and precision=fp32 only")


def _demo(name: str) -> TowerConfig:
    return TowerConfig(kind="demo", model=name, pretrained="demo")


@dataclass
class TextTowerConfig:
    """The text encoder behind conditions of words; none is loaded where `kind` is null."""

    kind: str | None = None
    """Who builds it: demo, open_clip, transformers, or null: captions leave no words."""
    model: str | None = None
    """Architecture, for example ViT-L-14-quickgelu (open_clip, or transformers' CLIP)."""
    pretrained: str | None = None
    """Weights: a pretrained tag, a local file or folder, or a hub id; null: random, fixed seed."""
    like: str | None = None
    """Pretrained tag whose activation a local open_clip file shares."""
    precision: str = choice("fp32", ("fp32", "bf16", "fp16"))
    """Number format of the weights and the forward pass: fp32, bf16 or fp16."""

    def __post_init__(self) -> None:
        check_fields(self, "towers.text.")
        if self.kind is not None:
            one_of("towers.text.kind", self.kind, TEXT_KINDS)
            if self.kind == "demo" and self.precision != "fp32":
                raise UserError("the demo's text tower has precision=fp32 only")

    @property
    def tower(self) -> TowerConfig:
        """The same words as a tower's, whose loader this one shares."""
        return TowerConfig(
            self.kind or "demo", self.model, self.pretrained, self.like, precision=self.precision
        )


@dataclass
class TowersConfig:
    """The pair: the condition tower is translated into the target tower."""

    condition: TowerConfig = field(default_factory=lambda: _demo("eva"))
    """Tower of the condition tokens."""
    target: TowerConfig = field(default_factory=lambda: _demo("clip"))
    """Tower of the target tokens."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    """Tower whose states of the captions' words are kept too, for conditions of words."""
    pretrained: bool = True
    """false: random weights with a fixed seed for all towers, for tests and dry runs."""


@dataclass
class PixelsConfig:
    """What is encoded of a picture; the defaults are what a viewer shows."""

    orientation: bool = True
    """Turn pictures upright by their EXIF orientation; false: not, as CLIP's own pipeline."""
    profile: bool = True
    """Convert colours from an embedded profile to sRGB; false takes the numbers as they are."""
    background: str = "white"
    """What lies below transparent pixels: a colour's name or #rrggbb."""

    def __post_init__(self) -> None:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(
                f"pixels.background={self.background} is no colour: a name or '\"#rrggbb\"'"
            ) from error

    def changes(self) -> dict[str, bool | str]:
        """Return what differs from the defaults, by key: it goes into the index."""
        return {key: v for key, v in asdict(self).items() if v != getattr(PixelsConfig, key)}
