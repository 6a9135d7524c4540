"""Words in the loss, in pairs and in guided sampling, and how they are standardised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blip3o_lit.base.condition import Condition, dropped
from blip3o_lit.base.shape import PairShape, SequenceShape, TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.pairs import Pairs
from blip3o_lit.flow.solvers import sample
from blip3o_lit.models.network_of import build_network
from blip3o_lit.tokens.statistics import Standardizer
from blip3o_lit.translation.translator import Translator

CONFIG = ModelConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_width=48, conditioning="cross")
SHAPE = PairShape(TokenShape((2, 2), False, 6), TokenShape((2, 2), False, 5), SequenceShape(9, 3))
LENGTHS = torch.tensor([2, 0, 9, 5])


def network(second_time: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    made = build_network(replace(CONFIG, second_time=second_time), SHAPE)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def draws(images: int = 4) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    sizes = ((images, 4, 5), (images, 4, 5))
    x1_BND, z_BND = (torch.randn(size, generator=random) for size in sizes)
    return x1_BND, z_BND, torch.tensor([0.0, 0.25, 0.5, 0.75])


def words(fill: float = 0.0) -> Condition:
    random = torch.Generator().manual_seed(4)
    tokens_BLE = 3 + 2 * torch.randn(4, 9, 3, generator=random)
    condition = Condition(torch.randn(4, 4, 6, generator=random), tokens_BLE, LENGTHS)
    return replace(condition, words=tokens_BLE.masked_fill(~condition.present[..., None], fill))


def translator() -> Translator:
    grid, target = (Standardizer(torch.zeros(4, n), torch.ones(4, n)) for n in (6, 5))
    scale = Standardizer(torch.full((1, 3), 3.0), torch.full((1, 3), 2.0))
    return Translator(
        network(),
        FlowObjective(FlowConfig(condition_dropout=0.1)),
        grid,
        target,
        words_standardizer=scale,
    ).eval()


def test_dropped_samples_train_as_those_that_never_had_a_condition() -> None:
    objective, net, drop_B = FlowObjective(FlowConfig()), network(), LENGTHS > 4
    whole = objective.loss(net, words(), *draws(), drop_B=drop_B)
    by_hand = objective.loss(net, dropped(words(), drop_B), *draws())
    assert torch.equal(whole.total, by_hand.total)
    plain = objective.loss(net, words(), *draws()).mse_B
    assert torch.equal(plain[~drop_B], whole.mse_B[~drop_B])
    assert (plain - whole.mse_B)[drop_B].abs().min() > 1e-4


def test_pairs_read_the_words_of_their_own_rows() -> None:
    """The loss of a batch does not change with its order."""
    objective, net = FlowObjective(FlowConfig(pairs=0.5)), network(second_time=True)
    pairs = Pairs(torch.tensor([0, 2]), torch.tensor([0.5, 0.75]))
    order = torch.tensor([2, 3, 0, 1])
    moved = Pairs(torch.tensor([2, 0]), pairs.s_P)
    one = objective.loss(net, words(), *draws(), pairs=pairs)
    other = objective.loss(net, words()[order], *(x[order] for x in draws()), pairs=moved)
    torch.testing.assert_close(one.mse_B[order], other.mse_B, atol=1e-6, rtol=1e-5)


def test_guidance_extrapolates_from_no_words_at_all() -> None:
    objective, net = FlowObjective(FlowConfig(condition_dropout=0.1)), network()
    solver = SolverConfig("mean", guidance_scale=2.5)
    noise_BND = draws()[1]
    results = [
        sample(objective, net, condition, noise_BND, replace(solver, guidance_scale=scale)).x1_BND
        for condition, scale in ((words(), 2.5), (words(), 1.0), (dropped(words()), 1.0))
    ]
    guided, conditioned, without = results
    torch.testing.assert_close(guided, torch.lerp(without, conditioned, 2.5), atol=1e-5, rtol=0)
    assert (guided - conditioned).abs().max() > 1e-2


def test_words_are_standardised_and_nothing_else_is() -> None:
    read = translator().standardised(words(fill=7.0))
    assert isinstance(read, Condition)
    assert read.words.shape == (4, 15, 3)  # with the null token a multiple of 8
    assert not read.words[~read.present].any()
    torch.testing.assert_close(
        read.words[:, :9][words().present] * 2 + 3, words().words[words().present]
    )


@pytest.mark.parametrize("label", ["mean", "heun"])
def test_generated_tokens_depend_on_their_own_caption_alone(label: str) -> None:
    """Neither on what lies behind it, nor on the other captions of a batch."""
    made, ids = translator(), torch.arange(4)
    solver = SolverConfig(label, steps=3, guidance_scale=1.0 if label == "mean" else 1.5)
    whole = made.generate(words(), ids, 0, solver).x1_BND
    other = made.generate(words(fill=torch.nan), ids, 0, solver).x1_BND
    assert torch.equal(whole, other)
    for row in range(4):
        own = words()[row : row + 1]
        own = replace(own, words=own.words[:, : max(1, int(own.length))])
        alone = made.generate(own, ids[row : row + 1], 0, solver).x1_BND
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"words": torch.zeros(4, 9, 2)}, r"expected \[B, L, 3\]"),
        ({"length": torch.tensor([1, 2, 3, 10])}, "of 0 to 9"),
        ({"length": LENGTHS.int()}, "int64"),
        ({"grid": None}, r"expected \[4, 4, 6\]"),
        ({"words": torch.full((4, 9, 3), torch.inf)}, "NaN or infinity"),
    ],
)
def test_wrong_conditions_are_refused_in_one_line(change: dict, word: str) -> None:
    words().check(SHAPE)
    with pytest.raises(UserError, match=word) as caught:
        replace(words(), **change).check(SHAPE)
    assert "\n" not in str(caught.value)


def test_a_shape_with_words_comes_back_from_a_file() -> None:
    for shape in (SHAPE, replace(SHAPE, condition=None), replace(SHAPE, words=None)):
        assert PairShape.from_dict(shape.to_dict()) == shape
    assert "words" not in replace(SHAPE, words=None).to_dict()
    assert SHAPE.fits(replace(SHAPE, words=SequenceShape(12, 3)))
    assert not SHAPE.fits(replace(SHAPE, words=SequenceShape(9, 4)))
    for damaged in (
        {"longest": 0, "width": 3},
        {"width": 3},
        "words",
        {"longest": 1.5, "width": 3},
    ):
        with pytest.raises(UserError, match=r"shape\.words is damaged"):
            PairShape.from_dict({**SHAPE.to_dict(), "words": damaged})
