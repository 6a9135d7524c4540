"""Blocks with products in float8, emulated: near bf16, compiled and sharded, the same names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.float8 import float8_blocks
from blip3o_lit.models.network import Network
from blip3o_lit.models.network_of import build_network
from blip3o_lit.training.fsdp2 import shard, whole

pytest.importorskip("torchao", reason="float8 needs torchao: pip install 'blip3o-lit[fp8]'")
SHAPE = PairShape(TokenShape((4, 4), False, 48), TokenShape((4, 4), False, 32))
DIT = ModelConfig(width=64, depth=2, heads=4, kv_heads=2, mlp_width=128)
NEXTDIT = ModelConfig("nextdit", 64, 2, 4, 4, 128, conditioning="cross", key_rope=False)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def awake(config: ModelConfig) -> Network:
    """Return a network of random weights: a new one answers zero."""
    network, draw = build_network(config, SHAPE), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    return network


def step(network: Network) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output of a pass, and all gradients."""
    draw = torch.Generator().manual_seed(1)
    x_BND, c_BMC = (torch.randn(4, 16, width, generator=draw) for width in (32, 48))
    with torch.autocast("cpu", torch.bfloat16):
        out_BND = network(x_BND, torch.linspace(0.1, 0.9, 4), c_BMC)
    out_BND.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return out_BND.detach(), whole(gradients, keep=True)


@pytest.mark.parametrize("config", [DIT, NEXTDIT], ids=["dit", "nextdit"])
def test_float8_is_near_bf16_alone_compiled_and_sharded(config: ModelConfig, alone: None) -> None:
    plain, (expected_BND, gradients) = awake(config), step(awake(config))
    network = awake(config)
    float8_blocks(network, emulate=True)
    assert "Float8Linear" in str(network.blocks)
    assert list(network.state_dict()) == list(plain.state_dict())
    out_BND, own = step(network)
    assert not torch.equal(out_BND, expected_BND)
    assert (out_BND - expected_BND).norm() < 0.1 * expected_BND.norm()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() < 0.3 * gradient.norm() + 1e-6, name
    torch._dynamo.reset()
    network = awake(config)
    float8_blocks(network, emulate=True)
    network.compile_blocks("aot_eager")
    shard(network, init_device_mesh("cpu", (1,)), torch.bfloat16)
    sharded_BND, _ = step(network)
    assert (sharded_BND - out_BND).norm() < 0.02 * out_BND.norm()
