"""A training step, beside the matmul ceiling, diffusers' Lumina model and torch's own encoder.

All networks have the same width, depth, heads, tokens and precision; a step is forward, backward
and fused AdamW on the flow objective's own kind of loss. "a run's" is all that a run does: the flow
objective with its cosine term and the weight average too. BENCH_COMPILED=1 compares compiled ones
(minutes of compilation).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.ceiling import products
from benchmarks.timing import interleaved, result
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.training.ema import update_averages

SHAPE = PairShape(TokenShape((16, 16), False, 4096), TokenShape((16, 16), False, 1024))
TOKENS = 256
CASES = (("tiny", 8, torch.bfloat16, 0.55, 9), ("base", 4, torch.bfloat16, 0.55, 5),
         ("tiny", 8, torch.float32, 0.65, 5), ("base", 4, torch.float32, 0.65, 3))  # fmt: skip
"""Model, batch, number format, target share of the matmul ceiling, rounds."""
COMPILED = os.environ.get("BENCH_COMPILED") == "1"


def model_config(name: str, **switches: Any) -> ModelConfig:
    """Return a shipped size."""
    file = Path(__file__).resolve().parent.parent / "conf" / "model" / f"{name}.yaml"
    return ModelConfig(**{**yaml.safe_load(file.read_text()), **switches})


class Encoder(nn.Module):
    """The floor of effort: torch's encoder layers on the sum of both projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input, self.condition = nn.Linear(1024, config.width), nn.Linear(4096, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        self.output = nn.Linear(config.width, 1024)

    def forward(self, x_BND: Tensor, t_B: Tensor, condition_BMC: Tensor) -> Tensor:
        """Evaluate; the time is added to each token."""
        hidden = self.input(x_BND) + self.condition(condition_BMC) + t_B[:, None, None]
        return self.output(self.blocks(hidden))


class Lumina(nn.Module):
    """diffusers' LuminaNextDiT2DModel on a 16x16 grid of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        self.model = LuminaNextDiT2DModel(
            sample_size=16, patch_size=1, in_channels=1024, hidden_size=config.width,
            num_layers=config.depth, num_attention_heads=config.heads,
            num_kv_heads=config.kv_heads, cross_attention_dim=4096, learn_sigma=False,
        )  # fmt: skip
        self.rope = get_2d_rotary_pos_embed_lumina(config.width // config.heads, 16, 16)
        self.register_buffer("mask", torch.ones(1, TOKENS, dtype=torch.bool))

    def forward(self, x_BND: Tensor, t_B: Tensor, condition_BMC: Tensor) -> Tensor:
        """Evaluate on tokens laid out as a picture."""
        image = x_BND.transpose(1, 2).unflatten(2, (16, 16))
        mask = self.get_buffer("mask").expand(len(x_BND), -1)
        out = self.model(image, t_B, condition_BMC, mask, self.rope, {}, return_dict=False)[0]
        return out.flatten(2).transpose(1, 2)


def stepper(
    network: nn.Module, batch: int, dtype: torch.dtype, tokens: int = TOKENS
) -> Callable[[], None]:
    """Return a function that takes one training step."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    random = torch.Generator().manual_seed(0)
    x_BND, true_BND = (torch.randn(batch, tokens, 1024, generator=random) for _ in range(2))
    condition = torch.randn(batch, tokens, 4096, generator=random)
    t_B = torch.rand(batch, generator=random)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out_BND = network(x_BND, t_B, condition)
        loss = (out_BND.float() - true_BND).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def real_step(config: ModelConfig, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return a whole step of a run: the flow objective, clipping, AdamW and the weight average."""
    network, objective = build_network(config, SHAPE), FlowObjective(FlowConfig())
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    x1_BND, z_BND = (torch.randn(batch, TOKENS, 1024) for _ in range(2))
    condition, t_B = torch.randn(batch, TOKENS, 4096), torch.rand(batch)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = objective.loss(network, condition, x1_BND, z_BND, t_B).total
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        update_averages([average], network, [0.99])
        optimizer.zero_grad()

    return step


def saved_bytes(network: nn.Module, batch: int, tokens: int = TOKENS) -> int:
    """Return the bytes that one forward pass in bf16 keeps for the backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_BND, condition = torch.randn(batch, tokens, 1024), torch.randn(batch, tokens, 4096)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = network(x_BND, torch.rand(batch), condition)  # noqa: F841  (keeps the graph alive)
    return sum(kept.values())


def run() -> list[dict[str, Any]]:
    """Time each case; ratios above 1 say that ours is faster or smaller."""
    return [entry for case in CASES for entry in _case(*case)]


def _case(
    name: str, batch: int, dtype: torch.dtype, target: float, rounds: int
) -> list[dict[str, Any]]:
    """Time one size and format, all networks and the ceiling in turn."""
    config = model_config(name)
    label = f"{name}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    peers = label == "tiny_bf16"
    nets: dict[str, Any] = {
        "ours": build_network(config, SHAPE),
        "cross": build_network(model_config(name, conditioning="cross"), SHAPE),
    }
    if peers:
        nets |= {"lumina": Lumina(config), "encoder": Encoder(config)}
    multiply, flops = products(config, batch * TOKENS, dtype)
    steps = {case: stepper(network, batch, dtype) for case, network in nets.items()}
    steps |= {"a run's": real_step(config, batch, dtype), "products": multiply}
    seconds = interleaved(steps, rounds=rounds)
    found = _shares(label, nets, seconds, batch, flops, target)
    if peers:
        over = {case: seconds[case] / seconds["ours"] for case in seconds}
        kept = {case: saved_bytes(nets[case], 2) for case in ("ours", "lumina")}
        found += [
            result(f"training/{label}_over_lumina_eager", over["lumina"], "x", 2.0),
            result(f"training/{label}_over_torch_encoder", over["encoder"], "x", 1.0),
            result(
                f"training/{label}_activations_over_lumina",
                kept["ours"] / kept["lumina"], "x", 0.5, "lower",
            ),
        ]  # fmt: skip
    if COMPILED and dtype == torch.bfloat16:
        found += _compiled(nets, batch, label, multiply, flops, target)
    return found


def _shares(
    label: str,
    nets: dict[str, Any],
    seconds: dict[str, float],
    batch: int,
    flops: float,
    target: float,
) -> list[dict[str, Any]]:
    """Print images/s and shares of the ceiling; ours is held against the target."""
    ceiling = flops / seconds["products"]
    shares = {}
    for case, value in seconds.items():
        if case == "products":
            continue
        counted = nets["cross" if case == "cross" else "ours"]
        shares[case] = 3 * counted.forward_flops(batch) / value / ceiling
        own = f"{shares[case]:.2f} of the ceiling" if case not in ("lumina", "encoder") else ""
        speed = f"{batch / value:7.2f} images/s  {1e3 * value:6.0f} ms a step"
        print(f"  {label} {case:<8} {speed}  {own}")
    print(f"  {label} matmul ceiling {ceiling / 1e9:.0f} GFLOP/s")
    return [result(f"training/{label}_share_of_matmul", shares["ours"], "x", target)]


def _compiled(
    nets: dict[str, Any],
    batch: int,
    label: str,
    multiply: Callable[[], None],
    flops: float,
    target: float,
) -> list[dict[str, Any]]:
    """Compare ours, and Lumina where it is there, each compiled by block."""
    for network in (nets["ours"], nets["cross"]):
        network.compile_blocks()
    nets = {case: network for case, network in nets.items() if case != "encoder"}
    if "lumina" in nets:
        for layer in nets["lumina"].model.layers:
            layer.compile()
    steps = {case: stepper(network, batch, torch.bfloat16) for case, network in nets.items()}
    seconds = interleaved(steps | {"products": multiply}, rounds=5, warm_up=2)
    found = _shares(f"{label}_compiled", nets, seconds, batch, flops, target)
    if "lumina" in nets:
        ratio = seconds["lumina"] / seconds["ours"]
        found.append(result(f"training/{label}_over_lumina_compiled", ratio, "x", 1.4))
    return found
