"""What a checkpoint every 100 steps costs a `base` network, and finding the place to resume at."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import result
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.checkpoints.files import AtomicCheckpointIO
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.tokens.reading.order import SampleOrder

EVERY, BATCH, STEPS = 100, 32, 2
SHAPE = PairShape(TokenShape((16, 16), False, 4096), TokenShape((16, 16), False, 1024))
MILLION = 1_000_000


def timed(work: Any) -> float:
    """Return the seconds that a call takes, the accelerator's part included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def checkpoint_share() -> tuple[float, float]:
    """Return a step's and a save's seconds for base: the default batch of 32, bf16, AdamW, EMA."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    micro = BATCH if device == "cuda" else 4
    with torch.device(device):
        network, objective = build_network(ModelConfig(), SHAPE), FlowObjective(FlowConfig())
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        c, x = torch.randn(micro, 256, 4096), torch.randn(micro, 256, 1024)
        t = torch.rand(micro)

    def micro_batch() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = objective.loss(network, c, x, torch.randn_like(x), t).total
        loss.backward()

    micro_batch()
    optimizer.step()
    forward = min(timed(micro_batch) for _ in range(STEPS))
    step = forward * (BATCH // micro) + timed(optimizer.step)
    state = network.state_dict()
    checkpoint = {
        "state_dict": {f"{part}.{k}": v for part in ("network", "ema") for k, v in state.items()},
        "optimizer_states": [optimizer.state_dict()],
    }
    # Both copies of the weights go to the disk, as a run's two networks do.
    for name, tensor in state.items():
        checkpoint["state_dict"][f"ema.{name}"] = tensor.clone()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "step.ckpt"
        return step, timed(lambda: AtomicCheckpointIO().save_checkpoint(checkpoint, path))


def place_seconds() -> float:
    """Return the seconds to find the next batch in mid-epoch of ten million samples, a million."""
    sizes = np.full(10 * MILLION // 256, 256)
    started = time.perf_counter()
    SampleOrder(0, sizes, 4).at(25 * MILLION, 1024)
    return (time.perf_counter() - started) / 10


def run() -> list[dict[str, Any]]:
    """Measure both; the share is of the throughput at a checkpoint every 100 steps."""
    step, saving = checkpoint_share()
    print(f"a step of base takes {step:.3g} s, a synced checkpoint {saving:.3g} s")
    return [
        result("checkpoint every 100", saving / (EVERY * step), "share", 0.02, "lower"),
        result("resume position", place_seconds(), "s/million", 1.0, "lower"),
    ]
