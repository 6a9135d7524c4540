"""DiT: a plain reference, cached conditions, what must change nothing, refusals."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.activations import LiveBytes
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.dit import DiT
from blip3o_lit.models.optimizer import make_optimizer

TINY = ModelConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_width=48)
CROSS = dataclasses.replace(TINY, conditioning="cross")
BOTH = pytest.mark.parametrize("config", [TINY, CROSS], ids=["aligned", "cross"])


def pair(grid=(4, 3), source=None, source_cls=False, target_cls=False):
    return PairShape(TokenShape(source or grid, source_cls, 24), TokenShape(grid, target_cls, 20))


def awake(config, shape, seed=0):
    """Build a network whose zero-initialised layers are not zero."""
    torch.manual_seed(seed)
    network = DiT(config, shape)
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network


def inputs(shape, batch=3):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, shape.target.tokens, shape.target.width, generator=generator)
    c = torch.randn(batch, shape.condition.tokens, shape.condition.width, generator=generator)
    return x, torch.rand(batch, generator=generator), c


def plain_forward(network, x, t, c):
    """Compute the network's function from its weights, by loops and definitions."""
    config, shape = network.config, network.shape
    weights = dict(network.named_parameters())
    heads, groups, width = config.heads, config.kv_heads, config.width
    size = width // heads

    def linear(name, value):
        out = torch.einsum("...i,oi->...o", value, weights[f"{name}.weight"])
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def rms(value, weight=1.0):
        return value / torch.sqrt(torch.mean(value**2, -1, keepdim=True) + 1e-6) * weight

    def silu(value):
        return value / (1 + torch.exp(-value))

    def turn(value, side):
        """Rotate [N, K] of one head; angles are written out cell by cell."""
        out = value.clone()
        for token in range(side.tokens):
            cell = token - int(side.cls)
            if cell < 0:
                continue
            place = (cell // side.grid[1], cell % side.grid[1])
            for axis in range(2):
                ratio = shape.target.grid[axis] / side.grid[axis]
                where = (place[axis] + 0.5) * ratio - 0.5
                for step in range(size // 4):
                    i = axis * (size // 4) + step
                    j = i + size // 2
                    angle = torch.tensor(where * 100.0 ** (-step / (size // 4)))
                    a, b = value[token, i], value[token, j]
                    out[token, i] = a * angle.cos() - b * angle.sin()
                    out[token, j] = a * angle.sin() + b * angle.cos()
        return out

    def attention(name, q, k, v, key_side):
        """Attend for one image: q [N, W], k and v [M, G * K]."""
        out = []
        for head in range(heads):
            part = slice(head * size, head * size + size)
            group = head // (heads // groups)
            kept = slice(group * size, group * size + size)
            qh = turn(rms(q[:, part], weights[f"{name}.query_norm.weight"]), shape.target)
            kh = turn(rms(k[:, kept], weights[f"{name}.key_norm.weight"]), key_side)
            out.append(torch.softmax(qh @ kh.T / size**0.5, -1) @ v[:, kept])
        return linear(f"{name}.out", torch.cat(out, -1))

    results = []
    for xi, ti, ci in zip(x, t, c):
        angle = 1000 * ti * 10_000.0 ** (-torch.arange(128) / 128)
        time = torch.cat((angle.cos(), angle.sin()))
        time = linear("time.second", silu(linear("time.first", time)))
        signal = linear("modulation", silu(time + linear("pool", ci.mean(0)))).view(-1, width)
        projected = linear("condition", ci)
        h = linear("input", xi)
        if config.conditioning == "aligned":
            if shape.condition.cls and not shape.target.cls:
                projected = projected[1:]
            if shape.target.cls and not shape.condition.cls:
                projected = torch.cat((weights["cls_condition"][None], projected))
            h = h + projected
        row = 0
        for index in range(config.depth):
            for branch in ("attention", "cross", "mlp"):
                if branch == "cross" and config.conditioning == "aligned":
                    continue
                shift, scale, gate = signal[row : row + 3]
                row += 3
                u = rms(h) * (1 + scale) + shift
                layer = f"blocks.{index}.{branch}.layer"
                if branch == "attention":
                    q, k, v = linear(f"{layer}.qkv", u).split(
                        (width, groups * size, groups * size), -1
                    )
                    u = attention(layer, q, k, v, shape.target)
                elif branch == "cross":
                    k, v = linear(f"{layer}.key_value", projected).chunk(2, -1)
                    q = linear(f"{layer}.query", u)
                    u = attention(layer, q, k, v, shape.condition)
                else:
                    a, b = linear(f"{layer}.gate_up", u).chunk(2, -1)
                    u = linear(f"{layer}.down", silu(a) * b)
                h = h + gate * u
        results.append(linear("output", rms(h) * (1 + signal[row + 1]) + signal[row]))
    return torch.stack(results)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (TINY, pair()),
        (TINY, pair(source_cls=True, target_cls=True)),
        (TINY, pair(source_cls=True)),
        (TINY, pair(target_cls=True)),
        (CROSS, pair()),
        (CROSS, pair(source=(2, 3), source_cls=True, target_cls=True)),
        (CROSS, pair(grid=(2, 2), source=(4, 4))),
    ],
)
@torch.no_grad()
def test_forward_equals_the_plain_reference(config, shape):
    network, (x, t, c) = awake(config, shape), inputs(shape, batch=2)
    expected = plain_forward(network, x, t, c)
    assert expected.std() > 0.05
    torch.testing.assert_close(network(x, t, c), expected, atol=2e-5, rtol=2e-4)


@BOTH
def test_output_is_exactly_zero_and_blocks_are_the_identity_at_initialisation(config):
    shape = pair()
    network, (x, t, c) = DiT(config, shape), inputs(shape)
    assert torch.equal(network(x, t, c), torch.zeros_like(x))
    torch.nn.init.ones_(network.output.weight)
    encoded = network.encode(c)
    h = network.input(x) + (0 if encoded.tokens is None else encoded.tokens)
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(network(x, t, c), network.output(normed))


@BOTH
def test_an_encoded_condition_serves_every_step(config):
    shape = pair(source_cls=True)
    network, (x, t, c) = awake(config, shape), inputs(shape)
    encoded = network.encode(c)
    for time in (t, torch.zeros_like(t), torch.ones_like(t)):
        assert torch.equal(network(x, time, encoded), network(x, time, c))


@BOTH
def test_every_parameter_gets_a_gradient_once_the_gates_are_open(config):
    shape = pair(target_cls=True)
    network, (x, t, c) = DiT(config, shape), inputs(shape)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):  # step 1 opens the output, step 2 the gates, step 3 reaches everything
        optimizer.zero_grad()
        (network(x, t, c) - torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@BOTH
def test_the_condition_is_read_by_position(config):
    """Moving a whole picture moves its translation; mixing up the condition alone does not."""
    shape = pair(grid=(4, 4))
    network, (x, t, c) = awake(config, shape), inputs(shape)
    moved = [tokens.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2) for tokens in (x, c)]
    out = network(x, t, c)
    assert not torch.allclose(network(x, t, moved[1]), out, atol=1e-3)
    network.rope.zero_()[0] = 1  # without positions a permutation of all tokens passes through
    if network.rope_condition is not None:
        network.rope_condition.zero_()[0] = 1
    plain = network(x, t, c).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(network(moved[0], t, moved[1]), plain, atol=1e-5, rtol=1e-4)


@BOTH
def test_checkpointing_and_compiling_change_no_value_and_no_name(config):
    shape = pair()
    eager, (x, t, c) = awake(config, shape), inputs(shape)
    saving = DiT(dataclasses.replace(config, activation_checkpointing=True), shape)
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks(backend="aot_eager")  # the benchmarks run inductor: 15 s a compile
    saving.load_state_dict(compiled.state_dict())
    assert list(compiled.state_dict()) == list(eager.state_dict())
    eager(x, t, c).square().sum().backward()
    for other in (saving, compiled):
        out = other(x, t, c)
        torch.testing.assert_close(out, eager(x, t, c), atol=1e-5, rtol=1e-4)
        out.square().sum().backward()
        for (name, a), b in zip(eager.named_parameters(), other.parameters()):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3, msg=name)


def measured(forward, compiled):
    """Return the bytes that a pass keeps, and its loss; a compiler steps aside for a LiveBytes."""
    if not compiled:
        with LiveBytes() as live:
            loss = forward()
            return live.now, loss
    sizes = {}
    note = lambda x: sizes.setdefault(x.untyped_storage().data_ptr(), x.nbytes) and x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = forward()
    return sum(sizes.values()), loss


@pytest.mark.parametrize("compiled", [False, True])
def test_an_activation_budget_keeps_less_and_changes_no_gradient(compiled):
    shape = pair()
    (x, t, c), kept, plain = inputs(shape), {}, awake(TINY, shape)
    for budget in (1.0, 0.4):
        network = DiT(dataclasses.replace(TINY, activation_budget=budget), shape)
        network.load_state_dict(plain.state_dict())
        if compiled:
            network.compile_blocks(backend="aot_eager")  # with inductor's choice of what to keep
        kept[budget], loss = measured(lambda n=network: n(x, t, c).square().sum(), compiled)
        loss.backward()
        for (name, weight), own in zip(network.named_parameters(), plain.parameters()):
            if budget == 1.0:
                own.grad = weight.grad
            else:
                torch.testing.assert_close(weight.grad, own.grad, msg=name)
    assert kept[0.4] < 0.8 * kept[1.0]


@BOTH
@pytest.mark.parametrize("cls", [False, True])
def test_flops_are_those_of_a_call_and_counting_them_leaves_no_trace(config, cls):
    shape = pair(source_cls=True, target_cls=cls)
    network = DiT(dataclasses.replace(config, depth=4), shape)
    x, t, c = inputs(shape)
    before = torch.random.get_rng_state()
    flops = network.forward_flops(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    with FlopCounterMode(display=False) as counter:
        network(x, t, c)
    assert flops == counter.get_total_flops()
    assert flops > 2 * 3 * shape.target.tokens * sum(p.numel() for p in network.blocks.parameters())


@BOTH
def test_a_network_from_the_meta_device_can_be_materialised(config):
    shape = pair(target_cls=True)
    with torch.device("meta"):
        network = DiT(config, shape)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    network.to_empty(device="cpu")
    expected = DiT(config, shape)
    for each in (network, expected):
        torch.manual_seed(3)
        each.init_weights()
    for a, b in zip(network.state_dict().values(), expected.state_dict().values()):
        assert torch.equal(a, b)
    for a, b in zip(network.buffers(), expected.buffers()):
        assert torch.equal(a, b)


@BOTH
def test_half_precision_runs_near_fp32_and_returns_the_input_dtype(config):
    shape = pair()
    network, (x, t, c) = awake(config, shape), inputs(shape)
    exact = network(x, t, c)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, t, c)
    half = copy.deepcopy(network).bfloat16()
    for out in (mixed, half(x, t, c), half(x, t, half.encode(c))):
        assert out.dtype == torch.float32
        assert (out - exact).abs().max() < 0.05 * exact.abs().max()
    assert half(x.bfloat16(), t, c).dtype == torch.bfloat16


def test_weight_decay_goes_to_matrices_alone():
    network = DiT(TINY, pair(target_cls=True))
    groups = make_optimizer(network, OptimizerConfig()).param_groups
    matrices, rest = (group["params"] for group in groups)
    assert groups[0]["weight_decay"] > 0
    assert groups[1]["weight_decay"] == 0
    assert len(matrices) + len(rest) == len(list(network.parameters()))
    assert all(p.ndim == 2 for p in matrices)
    assert any(p is network.cls_condition for p in rest)


def test_rotary_tables_are_not_saved():
    assert not [name for name in DiT(CROSS, pair()).state_dict() if "rope" in name]


def test_aligned_refuses_unequal_grids_and_names_the_way_out():
    with pytest.raises(UserError, match="model.conditioning=cross") as caught:
        DiT(TINY, pair(source=(2, 2)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"heads": 5}, "model.heads=5"),
        ({"kv_heads": 3}, "model.kv_heads=3"),
        ({"width": 24}, "multiple of 4"),
        ({"depth": 0}, "model.depth=0"),
        ({"conditioning": "alligned"}, "model.conditioning=aligned"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(change, word):
    with pytest.raises(UserError, match=word) as caught:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(caught.value)
