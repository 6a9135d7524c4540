"""A training step, beside the matmul ceiling, diffusers' Lumina model and torch's own encoder.

All networks have the same width, depth, heads, tokens and precision; a step is forward, backward
and fused AdamW on the flow objective's own kind of loss. BENCH_COMPILED=1 compares compiled ones
too (minutes of compilation).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.ceiling import matmul_flops
from benchmarks.timing import interleaved, result, save, show
from blip3o_lit.callbacks.ema import update_average
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.shape import PairShape, TokenShape
from blip3o_lit.environment import keep_freed_memory
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.build import build_network

SHAPE = PairShape(TokenShape((16, 16), False, 4096), TokenShape((16, 16), False, 1024))
TOKENS = 256
CASES = (("tiny", 8, torch.bfloat16, 0.55), ("base", 4, torch.bfloat16, 0.55),
         ("tiny", 8, torch.float32, 0.65))  # fmt: skip
"""Model, batch, number format, target share of the matmul ceiling."""


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
        update_average(average, network, 0.99)
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
    keep_freed_memory()  # as a training run does
    found: list[dict[str, Any]] = []
    for name, batch, dtype, target in CASES:
        config = model_config(name)
        network = build_network(config, SHAPE)
        rounds = 5 if (name, dtype) == ("tiny", torch.bfloat16) else 3
        label = f"{name}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        ceiling = matmul_flops(config, batch * TOKENS, dtype)
        cases = {"ours": network}
        if (name, dtype) == ("tiny", torch.bfloat16):
            cases |= {"cross": build_network(model_config(name, conditioning="cross"), SHAPE),
                      "lumina": Lumina(config), "encoder": Encoder(config)}  # fmt: skip
        steps = {case: stepper(one, batch, dtype) for case, one in cases.items()}
        seconds = interleaved(steps, rounds=rounds)
        share = 3 * network.forward_flops(batch) / seconds["ours"] / ceiling
        for case, value in seconds.items():
            print(
                f"  {label} {case:<8} {batch / value:7.2f} images/s  {1e3 * value:7.0f} ms a step"
            )
        print(f"  {label} matmul ceiling {ceiling / 1e9:.0f} GFLOP/s")
        found.append(result(f"training/{label}_share_of_matmul", share, "x", target))
        if "lumina" in seconds:
            ratio = seconds["lumina"] / seconds["ours"]
            found.append(result(f"training/{label}_over_lumina_eager", ratio, "x", 2.0))
            ratio = seconds["encoder"] / seconds["ours"]
            found.append(result(f"training/{label}_over_torch_encoder", ratio, "x", 1.0))
            kept = {case: saved_bytes(cases[case], 2) for case in ("ours", "lumina")}
            share = kept["ours"] / kept["lumina"]
            entry = f"training/{label}_activations_over_lumina"
            found.append(result(entry, share, "x", 0.5, "lower"))
        if "lumina" in seconds and os.environ.get("BENCH_COMPILED") == "1":
            found.append(_compiled(cases, batch, dtype, label))
    return found


def _compiled(cases: dict[str, Any], batch: int, dtype: torch.dtype, label: str) -> dict[str, Any]:
    """Compare ours and Lumina, each compiled by block."""
    cases["ours"].compile_blocks()
    for layer in cases["lumina"].model.layers:
        layer.compile()
    steps = {case: stepper(cases[case], batch, dtype) for case in ("ours", "lumina")}
    seconds = interleaved(steps, rounds=5, warm_up=2)
    ratio = seconds["lumina"] / seconds["ours"]
    return result(f"training/{label}_over_lumina_compiled", ratio, "x", 1.4)


if __name__ == "__main__":
    found = run()
    show(found)
    save(found)
    sys.exit(0)
