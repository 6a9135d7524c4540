"""What an extraction takes before it starts: arithmetic, hours, memory and disk.

The towers are built without weights, so nothing is downloaded and a laptop answers in seconds.
"""

from __future__ import annotations

from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction.encoding import TowerSet
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.tower import tower_cost

IMAGES = 100_000
"""Priced where the source does not know how many it holds (tars)."""
SPEEDS = {
    "an H100 or H200": 4e14,
    "an A100": 1.5e14,
    "two CPU cores": 1e11,
}
"""Floating-point operations per second: about half of what a GPU reaches in large bf16 products
(estimates), and what two server cores gave in fp32 (`python -m benchmarks ONLY=extraction`)."""
PRICED, DOLLARS = "an H100 or H200", 3.0
"""What the cost is given for, and what an hour of it is taken to cost."""


def price(config: ExtractConfig, images: int = IMAGES) -> list[tuple[str, str]]:
    """Return what an extraction would take, as rows of a name and a value."""
    towers = {
        name: load_tower(tower, config.towers.pretrained, device="meta")
        for name, tower in (("eva", config.towers.condition), ("clip", config.towers.target))
    }
    costs = {name: tower_cost(tower) for name, tower in towers.items()}
    rows = []
    for name, cost in costs.items():
        size = f"{cost.parameters / 1e6:,.0f} M parameters, {cost.flops / 1e12:.3g} TFLOP an image"
        rows.append((name, f"{towers[name].info.name}: {size}"))
    flops = sum(cost.flops for cost in costs.values()) * images
    rows += [
        ("memory of the weights", f"{sum(c.bytes for c in costs.values()) / 1e9:,.1f} GB"),
        ("images", f"{images:,}"),
        ("arithmetic", f"{flops / 1e15:,.3g} PFLOP"),
    ]
    for name, speed in SPEEDS.items():
        hours = flops / speed / 3600
        time = f"{hours:,.0f} hours" if hours >= 100 else f"{hours:.2f} hours"
        rows.append((f"time on {name}", f"{time} at {speed / 1e12:g} TFLOP/s"))
    dollars = flops / SPEEDS[PRICED] / 3600 * DOLLARS
    rows.append((f"cost on {PRICED}", f"{dollars:,.2f} $ at {DOLLARS:g} $ an hour"))
    int8 = config.storage == "int8"
    storage = "float16" if int8 else config.storage
    thumbnails = config.thumbnails
    plan = TowerSet(towers, True, storage, config.store, "meta", thumbnails=thumbnails)
    tokens = sum(spec.nbytes for spec in plan.arrays.values() if spec.kind == "tokens")
    sample = plan.sample_bytes - (tokens // 2 if int8 else 0)
    disk = f"{sample * images / 1e9:,.1f} GB, {sample / 1e3:,.0f} kB an image"
    return [*rows, ("disk", f"{disk} (store={config.store} storage={config.storage})")]
