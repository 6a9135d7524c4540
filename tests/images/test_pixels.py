"""The pixels that are encoded are those that a viewer shows, whatever the file stores them as.

The references are made from the numbers that were put into the file, by the formats' own rules and
without PIL: rows and columns turned as EXIF defines, colours by the profile's matrix and curve.
"""

import io
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, features

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.towers import PixelsConfig
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.item import FORMATS, MAX_RATIO, Reject, decode
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import scene

SIDES = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}
"""Where a viewer shows the stored row 0 and column 0 of each orientation (EXIF 2.3, 4.6.4)."""
WIDE = np.array(
    [[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)
"""Columns: red, green and blue of Display P3 and of sRGB in XYZ, adapted to D50."""
GAMMA = {b"RGB ": 2.2, b"GRAY": 1.4}


def profile(space):
    """A minimal ICC profile (version 2.1): Display P3's colours with a gamma curve, or grey."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA[space] * 256)) + b"\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {bytes([c]) + b"XYZ": xyz(WIDE[:, n]) for n, c in enumerate(b"rgb")}
        tags |= {bytes([c]) + b"TRC": curve for c in b"rgb"}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ "
    )
    head += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    return head + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + table + body


PROFILES = {
    "": b"",
    "wide": profile(b"RGB "),
    "grey": profile(b"GRAY"),
    "damaged": profile(b"RGB ")[:200],
    "noise": b"no profile" * 20,
}


def exif(orientation):
    """An EXIF block that holds one tag."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x112, 3, 1, orientation, 0, 0)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, bits, palette=None, clear=None, orientation=1, icc=b""):
    """Encode samples `[H, W, channels]` of 1 to 16 bits; `clear` is the content of tRNS."""
    height, width, channels = samples.shape
    kind = 3 if palette is not None else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    flat = samples.reshape(height, -1)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    elif bits == 8:
        rows = [row.astype(np.uint8).tobytes() for row in flat]
    else:
        single = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in single]
    out = b"\x89PNG\r\n\x1a\n"
    out += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    out += chunk(b"iCCP", b"icc\0\0" + zlib.compress(icc)) if icc else b""
    out += chunk(b"PLTE", palette.astype(np.uint8).tobytes()) if palette is not None else b""
    out += chunk(b"tRNS", clear) if clear else b""
    out += chunk(b"eXIf", exif(orientation)) if orientation > 1 else b""
    out += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return out + chunk(b"IEND", b"")


def turned(shown, orientation):
    """Bring stored rows and columns to where a viewer shows them."""
    sides = SIDES[orientation]
    shown = np.swapaxes(shown, 0, 1) if sides[0] in "LR" else shown
    shown = shown[::-1] if "B" in sides else shown
    return shown[:, ::-1] if "R" in sides else shown


def in_srgb(colours, gamma, primaries):
    """Take colours 0..1 of a gamma curve and primaries to sRGB 0..1."""
    linear = np.clip((colours**gamma) @ (np.linalg.inv(SRGB) @ primaries).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def rendering(colours, alpha=None, orientation=1, icc="", background=(255, 255, 255)):
    """What a viewer shows of colours `[H, W, 1 or 3]` and alpha `[H, W]` 0..1, in grey levels."""
    if icc == "grey" and colours.shape[-1] == 1:
        colours = in_srgb(colours.repeat(3, -1), GAMMA[b"GRAY"], SRGB)
    elif icc == "wide":
        colours = in_srgb(colours * np.ones(3), GAMMA[b"RGB "], WIDE)
    shown = 255 * colours * np.ones(3)
    if alpha is not None:
        shown = alpha[..., None] * shown + (1 - alpha[..., None]) * np.asarray(background)
    return turned(shown, orientation)


def far(content, want, **keys):
    """Grey levels between what is decoded and what should be."""
    made = np.asarray(decode(content, PixelsConfig(**keys)), np.float64)
    assert made.shape == want.shape
    return np.abs(made - want).max()


LAYOUTS = {
    **{f"grey{bits}": (1, bits, False) for bits in (1, 2, 4, 8, 16)},
    **{f"grey{bits}+alpha": (2, bits, False) for bits in (8, 16)},
    **{f"colour{bits}": (3, bits, False) for bits in (8, 16)},
    **{f"colour{bits}+alpha": (4, bits, False) for bits in (8, 16)},
    **{f"grey{bits}+key": (1, bits, True) for bits in (1, 2, 4, 8, 16)},
    **{f"colour{bits}+key": (3, bits, True) for bits in (8, 16)},
}


@pytest.mark.parametrize("icc", PROFILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_depth_alpha_profile_and_orientation_is_shown(layout, icc):
    channels, bits, key = LAYOUTS[layout]
    white = 2**bits - 1
    for orientation in SIDES:
        rng = np.random.default_rng([channels, bits, orientation])
        samples = rng.integers(0, white + 1, (5, 9, channels))
        if bits == 16 and icc:  # PIL rounds to 8 bits first, and curves are steep near black
            samples = samples // 257 * 257
        colours, alpha, clear = samples / white, None, None
        if key:
            clear = struct.pack(f">{channels}H", *samples[2, 3])
            alpha = 1.0 - (samples == samples[2, 3]).all(-1)
        elif channels in (2, 4):
            samples[:2, :, -1] = 0
            samples[2, :, -1] = white
            alpha = samples[..., -1] / white
            colours = samples[..., :-1] / white
        content = png(samples, bits, None, clear, orientation, PROFILES[icc])
        assert far(content, rendering(colours, alpha, orientation, icc)) <= 2
        upright = rendering(colours, alpha, 1, "", (0, 0, 255))
        keys = {"orientation": False, "profile": False, "background": "blue"}
        assert far(content, upright, **keys) <= 2


@pytest.mark.parametrize("icc", ["", "wide"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("clear", ["none", "one entry", "some entries", "every entry"])
def test_palettes_with_and_without_transparency_are_shown(bits, clear, icc):
    for orientation in SIDES:
        rng = np.random.default_rng([bits, orientation])
        entries = 2**bits
        palette = rng.integers(0, 256, (entries, 3))
        alphas = np.full(entries, 255)
        if clear == "one entry":
            alphas[entries // 2] = 0
        elif clear != "none":
            part = entries if clear == "every entry" else entries // 2
            alphas[:part] = rng.integers(0, 256, part)
        samples = rng.integers(0, entries, (5, 9, 1))
        given = None if clear == "none" else alphas.astype(np.uint8).tobytes()
        content = png(samples, bits, palette, given, orientation, PROFILES[icc])
        index = samples[..., 0]
        want = rendering(palette[index] / 255, alphas[index] / 255, orientation, icc)
        assert far(content, want) <= 2


def smooth(width=48, height=32):
    """A colour picture that lossy formats keep within a few levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [40 + 4 * columns, 30 + 5 * rows, 200 - 2 * columns - 2 * rows]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


ENCODINGS = {
    "JPEG": {"quality": 98, "subsampling": 0},
    "MPO": {"quality": 98, "subsampling": 0, "save_all": True, "append_images": [smooth()]},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF of LZW": {"compression": "tiff_lzw"},
    **({"AVIF": {"quality": 100, "subsampling": "4:4:4"}} if features.check("avif") else {}),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pictures_of_every_format_are_turned_upright(encoding):
    kind, options = encoding.split()[0], ENCODINGS[encoding]
    for orientation in SIDES:
        tag = Image.Exif()
        tag[0x112] = orientation
        content = encoded(smooth(), kind, exif=tag, **options)
        stored = np.asarray(smooth()) / 255
        assert far(content, rendering(stored, orientation=orientation)) <= 4
        opened = Image.open(io.BytesIO(content))
        assert decode(opened).tobytes() == decode(content).tobytes()
        if kind != "TIFF":  # which PIL itself turns
            assert far(content, rendering(stored), orientation=False) <= 4


@pytest.mark.parametrize("cut", range(0, 27, 2))
def test_a_damaged_orientation_turns_nothing_and_loses_nothing(cut):
    tag = b"Exif\0\0" + exif(6)
    content = encoded(smooth(), "JPEG", exif=tag[:cut] if cut else tag[:6] + b"\xff" * 20)
    plain = Image.open(io.BytesIO(encoded(smooth(), "JPEG")))
    upright = plain.transpose(Image.Transpose.ROTATE_270)
    known = [plain.tobytes(), upright.tobytes()]
    assert decode(content).tobytes() in (known[:1] if cut < 20 else known)


def test_deep_grey_of_tiff_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 1, 63).reshape(7, 9)
    for white, kind in (
        (65535, ">u2"),
        (65535, "<u2"),
        (2**31 - 1, "i4"),
        (65535, "i4"),
        (255, "i4"),
    ):
        levels = np.rint(ramp * white).astype(kind)
        assert far(encoded(Image.fromarray(levels), "TIFF"), rendering(ramp[..., None])) <= 1
    for white in (1, 255, 65535, 1e6):
        levels = (ramp * white).astype(np.float32)
        assert far(encoded(Image.fromarray(levels), "TIFF"), rendering(ramp[..., None])) <= 1
    deep = Image.fromarray(np.rint(ramp * 65535).astype(np.uint16))
    assert far(encoded(deep, "TIFF", tiffinfo={262: 0}), rendering(1 - ramp[..., None])) <= 1
    assert far(deep, rendering(ramp[..., None])) <= 1
    with pytest.raises(Reject, match="not all finite"):
        decode(encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"))


def test_printers_inks_and_lab_are_shown():
    inks = np.asarray(smooth().convert("CMYK").resize((48, 32))).copy()
    inks[..., 3] = 60
    want = 255 * (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)
    image = Image.fromarray(inks, "CMYK")
    assert far(encoded(image, "TIFF"), want) <= 2
    assert far(encoded(image, "JPEG", quality=98, subsampling=0), want) <= 4
    pale = Image.blend(smooth(), Image.new("RGB", (48, 32), "grey"), 0.7)
    assert far(encoded(pale.convert("LAB"), "TIFF"), np.asarray(pale, np.float64)) <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (9, 5), name) for name in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert decode(content).tobytes() == frames[0].tobytes()


def test_colours_below_transparent_pixels_are_never_read():
    rng = np.random.default_rng(0)
    alpha = Image.fromarray(np.repeat([[0, 255]], 8, 0).repeat(4, 1).astype(np.uint8))
    seen = set()
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        for _ in range(4):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            pixels[:, 4:] = (200, 60, 30)
            image = Image.fromarray(pixels)
            image.putalpha(alpha)
            seen.add(decode(encoded(image, kind, **options)).tobytes())
    assert len(seen) == 1
    gif = Image.new("P", (8, 8), 1)
    gif.putpalette([255, 0, 255, 200, 60, 30])
    gif.paste(0, (0, 0, 4, 8))
    assert decode(encoded(gif, "GIF", transparency=0)).tobytes() in seen


def test_drawn_pictures_stay_as_they_are():
    image = scene("train", 3).image
    assert decode(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000), (1, MAX_RATIO + 1), (66_000, 700)])
def test_absurd_shapes_are_refused_before_a_pixel_is_decoded(size):
    broken = png(np.zeros((1, 1, 1), int), 8).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", *size)
    )
    with pytest.raises(Reject, match=f"{size[0]} x {size[1]} pixels; {MAX_RATIO} to 1"):
        decode(_summed(broken))
    with pytest.raises(Reject, match="to 1"):
        decode(Image.new("1", size))
    assert decode(Image.new("L", (1, MAX_RATIO))).size == (1, MAX_RATIO)


def _summed(content):
    """Put the header's checksum right."""
    return content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "AVIF"])
def test_a_file_that_ends_early_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(Reject):
            decode(content[: int(part * len(content))])


def test_the_index_says_how_pictures_became_pixels(tmp_path):
    tag = Image.Exif()
    tag[0x112] = 6
    (tmp_path / "in").mkdir()
    smooth(64, 64).save(tmp_path / "in" / "a.png", exif=tag)
    towers = {"eva": demo.load("eva"), "clip": demo.load("clip")}
    hashes = set()
    for name, pixels in (("viewer", PixelsConfig()), ("clip", PixelsConfig(orientation=False))):
        out = tmp_path / name
        source = open_source(str(tmp_path / "in"), 8)
        extract(source, towers, out, ExtractConfig(pixels=pixels))
        index = TokenIndex.load(out)
        hashes.add(index.shards[0].sha256)
        recorded = index.arrays["clip"].preprocessing
        assert {"orientation": recorded.get("orientation", True)} == {
            "orientation": name == "viewer"
        }
    assert len(hashes) == 2
    with pytest.raises(UserError, match="made with another.* pixels"):
        extract(source, towers, out, ExtractConfig())


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(UserError, match=r"pixels\.background=chess is no colour"):
        PixelsConfig(background="chess")


def magick():
    """The command of an ImageMagick that runs here, or nothing."""
    for name in ("magick", "convert"):
        program = shutil.which(name)
        if program:
            version = subprocess.run([program, "-version"], capture_output=True, text=True)
            if version.stdout.startswith("Version: ImageMagick"):
                return [program]
    return []


def magick_shows(content):
    """Grey levels between what is decoded and what ImageMagick draws on white."""
    words = [*magick(), "-", "-auto-orient", "+repage", "-background", "white", "-flatten"]
    drawn = subprocess.run(
        [*words, "-depth", "8", "rgb:-"], input=content, capture_output=True, check=True
    )
    made = np.asarray(decode(content), np.int16)
    return np.abs(made - np.frombuffer(drawn.stdout, np.uint8).reshape(made.shape)).max()


@pytest.mark.skipif(not magick(), reason="ImageMagick is not installed")
def test_imagemagick_draws_the_same():
    for layout, (channels, bits, key) in LAYOUTS.items():
        rng = np.random.default_rng([channels, bits])
        samples = rng.integers(0, 2**bits, (5, 9, channels))
        clear = struct.pack(f">{channels}H", *samples[2, 3]) if key else None
        assert magick_shows(png(samples, bits, None, clear)) <= 2, layout
    for orientation in SIDES:  # of JPEG: version 6 passes over PNG's
        tag = Image.Exif()
        tag[0x112] = orientation
        assert magick_shows(encoded(smooth(), "JPEG", exif=tag, subsampling=0)) <= 2, orientation
