"""A training step, sampling, the optimizer and the data path on a CUDA GPU; toy sizes on a CPU.

`scripts/check_gpu.sh` runs this on a bare machine. MFU is of the data sheet's dense bf16 peak (on a
CPU, of a measured matmul). A trace of compiled steps goes to outputs/gpu_trace.json, for
https://ui.perfetto.dev.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import delivery
from benchmarks.timing import interleaved, result
from benchmarks.training import SHAPE, model_config
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.machine import peak_flops
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.solvers import sample
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.models.precision import PRECISIONS

CLS = PairShape(TokenShape((16, 16), True, 4096), TokenShape((16, 16), True, 1024))
GRID = PairShape(TokenShape((8, 8), False, 1280), TokenShape((8, 8), False, 768))
CASES = (
    ("tiny", "patch_only", SHAPE, 128, None),
    ("base", "patch_only", SHAPE, 64, 0.40),
    ("base", "cls_patch", CLS, 64, None),
    ("large", "patch_only", SHAPE, 32, None),
    ("nextdit", "grid_64", GRID, 64, 0.50),
)
"""Model, mode, shapes, images a step, target MFU."""


TRACE = Path("outputs") / "gpu_trace.json"


def seconds_a_call(call: Callable[[], None], device: torch.device, calls: int) -> float:
    """Return the median seconds of a call, the device's work included."""

    def whole() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return interleaved({"call": whole}, rounds=calls, warm_up=2)["call"]


def run() -> list[dict[str, Any]]:
    """Time every case, eager and compiled by block, then what surrounds a step."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    card = torch.cuda.get_device_name() if cuda else "CPU, toy sizes"
    peak = peak_flops(device, card, PRECISIONS["bf16"])
    print(f"  {card}: {peak / 1e12:.1f} TFLOP/s")
    found: list[dict[str, Any]] = []
    for name, mode, shape, batch, target in CASES:
        config, images = sized(name, device), batch if cuda else 2
        for compiled in (False, True) if cuda else (False,):
            label = f"{name}_{mode}"
            found += _case(label, config, shape, images, target, compiled, device, peak)
    _optimizers(device)
    found += delivery.run() if cuda else []
    return found


def sized(name: str, device: torch.device) -> ModelConfig:
    """Return a shipped size, or a toy of the same kind on a CPU."""
    config = model_config(name)
    if device.type == "cuda":
        return config
    return replace(config, width=64, depth=2, heads=4, kv_heads=4, mlp_width=128)


def _optimizers(device: torch.device) -> None:
    """Print what a step of `base`'s optimizer takes: Muon of all matrices at once, and AdamW."""
    for name in ("muon", "adamw"):
        with torch.device(device):
            network = build_network(sized("base", device), SHAPE)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = make_optimizer(network, OptimizerConfig(name, muon_layers="tokens"))
        optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        seconds = seconds_a_call(lambda step=optimizer.step: step() and None, device, 9)
        print(f"  gpu/base optimizer {name}: {1e3 * seconds:.2f} ms a step")


def _case(
    label: str,
    config: ModelConfig,
    shape: PairShape,
    batch: int,
    target: float | None,
    compiled: bool,
    device: torch.device,
    peak: float,
) -> list[dict[str, Any]]:
    """Time one network; on a CPU its share of the peak is printed but held against nothing."""
    with torch.device(device):
        network = build_network(config, shape)
        objective = FlowObjective(FlowConfig())
        x1_BND = torch.randn(batch, shape.target.tokens, shape.target.width)
        condition = torch.randn(batch, shape.condition.tokens, shape.condition.width)
        noise_BND, t_B = torch.randn_like(x1_BND), torch.rand(batch)
    if compiled:
        network.compile_blocks()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective.loss(network, condition, x1_BND, noise_BND, t_B).total
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def generate() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            sample(objective, network, condition, noise_BND, SolverConfig("heun", 10))

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_a_call(step, device, 12 if device.type == "cuda" else 3)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    drawn = seconds_a_call(generate, device, 3)
    if label == "base_patch_only" and compiled == (device.type == "cuda"):
        _trace(step, device)
    share = 3 * network.forward_flops(batch) / seconds / peak
    image = 2 * (x1_BND[0].numel() + condition[0].numel())
    name = f"gpu/{label}_{'compiled' if compiled else 'eager'}"
    print(
        f"  {name:<36} batch {batch:<4} {1e3 * seconds:8.1f} ms {batch / seconds:9.1f} images/s "
        f"{batch * shape.target.tokens / seconds / 1e3:8.0f}k tokens/s MFU {share:.2f} "
        f"{memory:.1f} GiB, reads {batch * image / seconds / 1e9:.2f} GB/s, "
        f"heun-10 {batch / drawn:.1f} images/s"
    )
    return [result(f"{name}_mfu", share, "x", target)] if target and memory else []


def _trace(step: Callable[[], None], device: torch.device) -> None:
    """Write a trace of three steps and print the operators that take the most time."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as recorded:
        for _ in range(3):
            step()
    TRACE.parent.mkdir(exist_ok=True)
    recorded.export_chrome_trace(str(TRACE))
    order = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))
