"""The CLIP image processor of Hugging Face folders, step for step, without transformers.

Shortest edge to S by PIL bicubic, centre crop with the offset rounded down, 0..255 to 0..1, then
mean and std. torchvision's CenterCrop, which open_clip uses, rounds half offsets to even: the two
crops differ by one pixel where the difference of the sizes is odd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters, as `preprocessor_config.json` gives them."""


@dataclass(frozen=True)
class ClipPixels:
    """From a picture to normalised pixels."""

    size: int = 224
    """Side of the crop."""
    shortest: int = 224
    """Length of the shortest edge after the resize."""
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image) -> Tensor:
        """Return `[3, S, S]` float32 from a picture of any mode and size."""
        image = image.convert("RGB")
        width, height = image.size
        short, long = sorted(image.size)
        other = int(self.shortest * long / short)
        new = (self.shortest, other) if width <= height else (other, self.shortest)
        image = image.resize(new, Image.Resampling[self.interpolation.upper()])
        left, top = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels_SS3 = np.asarray(image, np.float32) / 255
        pixels_SS3 = (pixels_SS3 - np.asarray(self.mean, np.float32)) / np.asarray(
            self.std, np.float32
        )
        return torch.from_numpy(pixels_SS3).permute(2, 0, 1).contiguous()

    def describe(self) -> dict[str, Any]:
        """Return the facts that go into the token index."""
        return {
            "size": self.size,
            "resize": "shortest",
            "shortest": self.shortest,
            "crop": "center_floor",
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @staticmethod
    def can(config: dict[str, Any]) -> bool:
        """Whether a `preprocessor_config.json` asks for these steps and no others."""
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        size, crop = config.get("size") or {}, config.get("crop_size") or {}
        return (
            all(config.get(step) for step in steps)
            and config.get("resample") in RESAMPLING
            and set(size) == {"shortest_edge"}
            and set(crop) == {"height", "width"}
            and crop["height"] == crop["width"]
            and abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-9
        )

    @classmethod
    def of(cls, config: dict[str, Any]) -> ClipPixels:
        """Take the numbers of a configuration that `can` has passed."""
        return cls(
            size=config["crop_size"]["height"],
            shortest=config["size"]["shortest_edge"],
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            interpolation=RESAMPLING[config["resample"]],
        )
