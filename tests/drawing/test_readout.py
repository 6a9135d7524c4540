"""The linear read-out finds pixels that tokens hold, in any mode and width, from its own split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing import readout
from blip3o_lit.drawing.readout import Readout, fitted_readout, psnr


def pictures(count: int, seed: int = 0, grid: tuple[int, int] = (3, 4), side: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    size = (grid[0] * side, grid[1] * side)
    return torch.rand(count, 3, *size, generator=rng) * 0.6 + 0.2


def tokens_of(pictures_B3HW: Tensor, width: int, cls: bool, side: int = 2) -> Tensor:
    """Mix each patch's pixels by a fixed matrix, beside louder channels that say nothing."""
    patches = F.unfold(pictures_B3HW, side, stride=side).transpose(1, 2)
    rng = torch.Generator().manual_seed(5)
    mixed = patches @ torch.randn(patches.shape[-1], width, generator=rng)
    noise_rng = torch.Generator().manual_seed(len(pictures_B3HW))
    loud = torch.randn(*mixed.shape[:2], width, generator=noise_rng) * 30
    loud[..., : width // 2] = 0
    tokens = torch.where(torch.arange(width) < width // 2, mixed, loud)
    first = torch.randn(len(tokens), 1, width, generator=noise_rng) * 1e3
    return torch.cat([first, tokens], 1) if cls else tokens


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("widest", [128, 12], ids=["whole tokens", "reduced"])
def test_pixels_that_tokens_hold_are_drawn_again(cls: bool, widest: int) -> None:
    """A reduction to as many directions as a patch has numbers keeps them, whatever is louder."""
    seen, held = pictures(60), pictures(10, seed=1)
    shape = TokenShape((3, 4), cls, 32)
    drawer = Readout(shape, side=2, widest=widest)
    assert drawer.ridge.weight.shape[1] == 9 * min(32, widest)
    drawer.fit(lambda: zip(tokens_of(seen, 32, cls).split(16), seen.split(16)))
    drawn = drawer.draw(tokens_of(held, 32, cls))
    assert drawn.shape == held.shape
    assert psnr(drawn, held).min() > 30


def test_a_patch_may_be_read_from_its_neighbours_alone() -> None:
    """Each token holds the pixels of the patch on its left; at the edge there is none."""
    seen, held = pictures(80), pictures(5, seed=1)

    def moved(given: Tensor) -> Tensor:
        tokens = tokens_of(given, 32, False).unflatten(1, (3, 4))
        return tokens.roll(1, 2).flatten(1, 2)

    drawer = Readout(TokenShape((3, 4), False, 32), side=2)
    drawer.fit(lambda: [(moved(seen), seen)])
    drawn = drawer.draw(moved(held))
    told, untold = (psnr(drawn[..., cut], held[..., cut]) for cut in (slice(6), slice(6, None)))
    assert told.min() > untold.max() + 3


def test_drawings_stay_in_range_and_larger_pictures_are_averaged() -> None:
    large = pictures(40, side=4)
    small = F.avg_pool2d(large, 2)
    shape = TokenShape((3, 4), False, 32)
    tokens = tokens_of(small, 32, False)
    one, other = Readout(shape, side=2), Readout(shape, side=2)
    one.fit(lambda: [(tokens, large)])
    other.fit(lambda: [(tokens, readout.at_grid(large, (3, 4), 2))])
    assert torch.equal(one.draw(tokens), other.draw(tokens))
    drawn = one.draw(torch.cat([tokens, -tokens]) * 100)
    assert drawn.min() == 0
    assert drawn.max() == 1


def test_psnr_is_that_of_its_definition() -> None:
    true = torch.full((2, 3, 4, 4), 0.5)
    drawn = true.clone()
    drawn[0] += 0.1
    drawn[1] += 0.01
    assert torch.allclose(psnr(drawn, true), torch.tensor([20.0, 40.0]).double(), atol=1e-4)
    assert psnr(true, true).isfinite().all()


def test_a_fit_is_kept_by_what_it_was_fitted_on(tmp_path: Path) -> None:
    shape, passes = TokenShape((3, 4), False, 32), []
    seen = pictures(20)
    tokens = tokens_of(seen, 32, False)

    def batches() -> list[tuple[Tensor, Tensor]]:
        passes.append(1)
        return [(tokens, seen)]

    first = fitted_readout("train", shape, batches, tmp_path, side=2)
    assert len(passes) == 2
    again = fitted_readout("train", shape, batches, tmp_path, side=2)
    assert len(passes) == 2
    assert torch.equal(first.draw(tokens), again.draw(tokens))
    fitted_readout("other", shape, batches, tmp_path, side=2)
    assert len(passes) == 4
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    files[0].write_bytes(b"cut")
    files[1].write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged: delete it"):
        fitted_readout("train", shape, batches, tmp_path, side=2)


def test_a_split_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 training images"):
        fitted_readout("none", TokenShape((3, 4), False, 32), lambda: [], tmp_path, side=2)
    assert list(tmp_path.iterdir()) == []
