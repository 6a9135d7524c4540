"""The CLIP image processor of Hugging Face folders, step for step, without transformers.

torchvision's CenterCrop, which open_clip uses, rounds half offsets to even, and so differs by one
pixel where the difference of the sizes is odd.
"""

from typing import Any

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor

from blip3o_lit.towers.vit import Pixels

RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters, as `preprocessor_config.json` gives them."""


def clip_pixels(
    size: int,
    shortest: int,
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN,
    std: tuple[float, ...] = OPENAI_DATASET_STD,
    interpolation: str = "bicubic",
) -> Pixels:
    """Return CLIP's preprocessing: shortest edge to `shortest`, then the central `size` square."""
    mean_3, std_3 = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def transform(image: Image.Image) -> Tensor:
        longest = int(shortest * max(image.size) / min(image.size))
        width, height = (shortest, longest) if image.width <= image.height else (longest, shortest)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
        image = image.crop((left, top, left + size, top + size))
        pixels_SS3 = (np.asarray(image, np.float32) / 255 - mean_3) / std_3
        return torch.from_numpy(pixels_SS3).permute(2, 0, 1).contiguous()

    facts = {
        "size": size,
        "resize": "shortest",
        "shortest": shortest,
        "crop": "center_floor",
        "interpolation": interpolation,
        "mean": list(mean),
        "std": list(std),
    }
    return Pixels(size, transform, facts)


def clip_pixels_of(config: dict[str, Any]) -> Pixels | None:
    """Read a `preprocessor_config.json`; None where it asks for other steps than CLIP's."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    if (
        not all(config.get(step) for step in steps)
        or config.get("resample") not in RESAMPLING
        or set(size) != {"shortest_edge"}
        or set(crop) != {"height", "width"}
        or crop["height"] != crop["width"]
        or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-9
    ):
        return None
    return clip_pixels(
        crop["height"],
        size["shortest_edge"],
        tuple(config["image_mean"]),
        tuple(config["image_std"]),
        RESAMPLING[config["resample"]],
    )
