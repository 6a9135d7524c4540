"""Workers of one int8 extraction share their scales, also where two measurements would differ."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.extraction.demo import demo_source
from blip3o_lit.extraction.encoding import TowerSet
from blip3o_lit.extraction.scales import stored_arrays
from blip3o_lit.towers import demo

CALLS = itertools.count(1)


class Unsteady(demo.DemoClip):
    """A tower that gives other tokens at every call, as an unsteady device would."""

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the tokens, larger each time."""
        return super().tokens(images_B3SS) * (1 + 0.1 * next(CALLS))


def test_workers_that_start_at_once_have_the_same_scales(tmp_path: Path) -> None:
    engine = EngineConfig(batch_size=4, shard_samples=8, threads=1, device="cpu")
    config = ExtractConfig(images="demo", storage="int8", extract=engine)

    def worker(number: int) -> dict[str, np.ndarray]:
        towers = TowerSet({"eva": Unsteady().eval(), "clip": Unsteady().eval()}, False, "float16")
        return stored_arrays(towers, demo_source(8, 4, 8), config, tmp_path)[1]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(worker, range(3)))
    assert set(found[0]) == {"eva", "clip"}
    for other in found[1:]:
        for name, scales in found[0].items():
            assert np.array_equal(other[name], scales)
