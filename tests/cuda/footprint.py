"""Bytes of a micro-batch by the plan, and by PyTorch's CUDA allocator: prints a JSON."""

import json
import sys

import torch

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.activations import activations
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import PRECISIONS

SHAPE = PairShape(TokenShape((16, 16), False, 4096), TokenShape((16, 16), False, 1024))
DIT = ModelConfig(width=768, depth=6, heads=12, kv_heads=4, mlp_width=2048)
NEXTDIT = ModelConfig("nextdit", 896, 4, 14, 14, 0, conditioning="cross", key_rope=False)
IMAGES = 16


def measured(model, precision):
    """Return the peak of a forward and backward pass beyond weights and their gradients."""
    with torch.device("cuda"):
        network = build_network(model, SHAPE).to(precision.weights)
        raw_BMC = torch.empty(IMAGES, 256, 4096, dtype=torch.float16)
        raw_BND = torch.empty(IMAGES, 256, 1024, dtype=torch.float16)
    objective = FlowObjective(FlowConfig())
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - raw_BMC.nbytes - raw_BND.nbytes
    condition_BMC, x1_BND = raw_BMC.float(), raw_BND.float()
    z_BND, t_B = torch.empty_like(x1_BND), torch.empty(IMAGES, device="cuda")
    with torch.autocast("cuda", precision.autocast, enabled=precision.autocast is not None):
        loss = objective.loss(network, condition_BMC, x1_BND, z_BND, t_B).total
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return torch.cuda.max_memory_allocated() - before, kept


found = {}
for word in sys.argv[1:]:
    name, format_word = word.split("/")
    model, precision = {"dit": DIT, "nextdit": NEXTDIT}[name], PRECISIONS[format_word]
    planned = activations(model, FlowConfig(), SHAPE, precision, "cuda").of(IMAGES, "single")
    peak, kept = measured(model, precision)
    found[word] = {"planned": planned, "peak": peak, "kept": kept, "ratio": planned / peak}
print("JSON", json.dumps(found))
