"""From what a file stores to what a viewer shows: eight bits of red, green and blue in sRGB.

CLIP's own pipeline calls `convert("RGB")` alone: it leaves a phone's pictures on their side, shows
the colours hidden below transparent pixels, and clips 16-bit grey to white.
"""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from blip3o_lit.config.towers import PixelsConfig

VIEWER = PixelsConfig()
"""The defaults: what a viewer shows."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each EXIF orientation upright."""
RANGES = (255, 2**16 - 1)
"""Whites of 32-bit grey, whose range no file names: the first that no pixel exceeds is taken, or
else the brightest pixel."""
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
"""PIL's modes of the colour spaces that a profile may describe."""
SAME = 1
"""Grey levels by which a profile may differ from sRGB and still leaves the pixels alone."""


def shown(image: Image.Image, pixels: PixelsConfig = VIEWER) -> Image.Image:
    """Return the RGB picture that a viewer shows; raises whatever PIL does on damaged input."""
    raw = _raw_mode(image)
    image.load()
    colours, alpha = _parts(image, raw)
    rgb = _srgb(colours, image.info.get("icc_profile") if pixels.profile else None)
    if alpha is not None and alpha.getextrema() != (255, 255):
        ground = Image.new("RGB", rgb.size, ImageColor.getrgb(pixels.background)[:3])
        ground.paste(rgb, mask=alpha)
        rgb = ground
    turn = TURNS.get(_orientation(image)) if pixels.orientation else None
    return rgb if turn is None else rgb.transpose(turn)


def _raw_mode(image: Image.Image) -> str:
    """Return how a PNG stores its pixels, for example `L;2`; PIL forgets it when it loads them."""
    tiles = getattr(image, "tile", [])
    return tiles[0][3] if tiles and isinstance(tiles[0][3], str) else image.mode


def _parts(image: Image.Image, raw: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours, in a mode without alpha, and the alpha in mode L or None."""
    key = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB") or image.mode.startswith(("I", "F")):
        alpha = None if key is None else _all_but(image, key, raw)
        return (_grey(image) if image.mode[0] in "IF" else image), alpha
    if image.mode == "LA" or raw == "LA;16B":  # which PIL loads as RGBA
        return image.getchannel(0), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return image, None


def _all_but(image: Image.Image, key: int | tuple[int, ...], raw: str) -> Image.Image:
    """Return the alpha of a picture in which one colour is transparent.

    PNG gives that colour in the file's own bits, PIL the pixels in 8 (of grey, in 8 or 16).
    """
    colour = np.asarray(key)
    if raw in ("L;2", "L;4"):
        colour = colour * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B":
        colour = colour >> 8
    levels = np.asarray(image)
    same = levels == colour.astype(levels.dtype)
    if same.ndim == 3:
        same = same.all(-1)
    return Image.fromarray(np.where(same, np.uint8(0), np.uint8(255)))


def _grey(image: Image.Image) -> Image.Image:
    """Return 12-, 16- and 32-bit grey in 8 bits."""
    facts = getattr(image, "tag_v2", {})
    levels = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = 12 if facts.get(BITSPERSAMPLE) == (12,) else 16
        white = 2**bits - 1
        table = np.rint(np.arange(2**16).clip(0, white) * (255 / white)).astype(np.uint8)
        grey = table[levels]
    else:
        high = float(levels.max())
        if not np.isfinite(high) or not np.isfinite(levels.min()):
            raise ValueError("its floating-point pixels are not all finite")
        ranges = (1, *RANGES) if image.mode == "F" else RANGES
        white = next((white for white in ranges if high <= white), high)
        scaled = levels.astype(np.float32) * np.float32(255 / white)
        grey = np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)
    white_is_zero = facts.get(PHOTOMETRIC_INTERPRETATION) == 0
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return colours in RGB, out of the space of their profile where it fits them."""
    if image.mode == "LAB":  # says by itself what its numbers look like
        return image.convert("RGB")
    if image.mode not in SPACES.values():
        image = image.convert("RGB")
    mode, transform = _transform(profile) if profile else ("", None)
    if transform is None or (image.mode, mode) not in _FITTING:
        return image.convert("RGB")
    return transform.apply(image.convert(mode))


_FITTING = {("L", "L"), ("L", "RGB"), ("RGB", "RGB"), ("CMYK", "CMYK")}
"""Modes of pictures and of the profiles that may stand in them."""


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return a profile's mode and its way to sRGB: None where it is sRGB, or is damaged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        facts: Any = own.profile
        mode = SPACES.get(facts.xcolor_space.strip(), "")
        if not mode:
            return "", None
        transform = ImageCms.buildTransform(own, srgb, mode, "RGB")
    except (OSError, ImageCms.PyCMSError):  # viewers show the pixels as they are
        return "", None
    if mode == "CMYK":
        return mode, transform
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, -1, 3)
    before = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
    after = np.asarray(transform.apply(before), np.int16)
    same = np.abs(after - np.asarray(before.convert("RGB"), np.int16)).max() <= SAME
    return mode, None if same else transform


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # PIL raises a dozen types on damaged EXIF, which viewers pass over
        return 1
