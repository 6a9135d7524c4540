"""The price of an extraction, against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.towers import TowerConfig, TowersConfig
from blip3o_lit.extraction.price import price

EVA = TowerConfig("eva_clip", "EVA-CLIP-8B", "BAAI/EVA-CLIP-8B", precision="fp16")
CLIP = TowerConfig("huggingface", "ViT-L-14-quickgelu", "openai/clip", precision="fp16")
SIGLIP = TowerConfig("open_clip", "ViT-B-16-SigLIP", "webli")


def rows(condition: TowerConfig = EVA, images: int = 100_000, **options: Any) -> dict[str, str]:
    towers = TowersConfig(condition, CLIP)
    return dict(price(ExtractConfig(towers=towers, **options), images))  # type: ignore[arg-type]


def test_the_missions_pair_costs_what_its_shapes_say() -> None:
    found = rows()
    assert "7,526 M parameters, 3.9 TFLOP" in found["eva"]
    assert "428 M parameters, 0.162 TFLOP" in found["clip"]
    assert found["memory of the weights"] == "15.9 GB"  # 2 bytes x 7.95 G
    assert found["arithmetic"] == "406 PFLOP"
    assert found["time on an H100 or H200"] == "0.28 hours at 400 TFLOP/s"
    assert found["cost on an H100 or H200"] == "0.85 $ at 3 $ an hour"  # 0.282 hours
    assert found["time on two CPU cores"] == "1,128 hours at 0.1 TFLOP/s"
    # 2 bytes x 257 tokens x 5120 channels = 2.632 MB, a caption's 768 numbers, tar headers
    assert rows(thumbnails=False)["disk"].startswith("263.")
    assert found["disk"].startswith("264.0")  # 2,560 bytes more, of a thumbnail
    assert rows(images=50_000)["arithmetic"] == "203 PFLOP"


@pytest.mark.parametrize(
    ("options", "gigabytes"),
    [
        ({"storage": "int8"}, 132),  # half
        ({"store": "grid_64"}, 26.6),  # 2 bytes x 64 x (1280 + 768)
    ],
)
def test_smaller_stores_are_priced_smaller(options: dict[str, str], gigabytes: float) -> None:
    disk = float(rows(**options)["disk"].split()[0])
    assert disk == pytest.approx(gigabytes, rel=0.02)


def test_what_a_tower_cannot_give_is_refused_before_it_is_downloaded() -> None:
    with pytest.raises(UserError, match="no projection for store=grid_64"):
        rows(SIGLIP, store="grid_64")
