"""A linear read-out from tokens to the pixels below them: what a picture of tokens is drawn with.

Each patch's pixels are a ridge regression on its token and that token's eight neighbours (the edge
tokens are repeated outwards). Wide tokens are first reduced to the directions that say most about
the pixels: reduced-rank regression (Izenman 1975), not PCA, whose largest directions say little.

Shape suffixes: B images, N tokens, C token width, R reduced width, P patches, H and W pixels.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.models.baselines import Ridge
from blip3o_lit.models.fitted import load_or_fit
from blip3o_lit.tokens.statistics import ChannelMoments

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Each call starts one pass: raw tokens [B, N, C] and their pictures [B, 3, H, W] in 0..1."""
WIDEST = 128
"""Nine times it is the width of the regression."""
VERSION = 1
"""Raised when the same tokens and pictures would give another read-out."""


class Readout(nn.Module):
    """Draws target tokens, once it is fitted on a training split; a CLS token is left out.

    `side` is in pixels per patch; tokens of a width above `widest` are reduced to it.
    """

    std_C: Tensor
    directions_CR: Tensor

    def __init__(self, shape: TokenShape, side: int = 4, widest: int = WIDEST) -> None:
        super().__init__()
        self.shape, self.side, self.widest = shape, side, widest
        width = min(shape.width, widest)
        self.register_buffer("std_C", torch.ones(shape.width))
        self.register_buffer("directions_CR", torch.eye(shape.width)[:, :width].contiguous())
        self.ridge = Ridge(self._regression(9 * width, self._patch))

    @property
    def _patch(self) -> int:
        return 3 * self.side**2

    def _regression(self, inputs: int, outputs: int) -> PairShape:
        grid = self.shape.grid
        return PairShape(TokenShape(grid, False, inputs), TokenShape(grid, False, outputs))

    @torch.no_grad()
    def fit(self, batches: Batches) -> None:
        """Fit in two passes, or four where tokens are reduced."""
        moments = [ChannelMoments.of(self._grid(tokens).flatten(0, 1)) for tokens, _ in batches()]
        if moments:
            total = moments[0]
            for part in moments[1:]:
                total = total.merge(part)
            self.std_C.copy_(total.std_C)
        if self.shape.width > self.widest:
            self.directions_CR.copy_(self._telling_directions(batches))
        self.ridge.fit(
            lambda: ((self._inputs(tokens), self._pixels(given)) for tokens, given in batches())
        )

    def _telling_directions(self, batches: Batches) -> Tensor:
        """Return the directions of a token that say most about the pixels of its neighbourhood.

        They are the principal directions of what a full regression predicts.
        """
        outputs = 9 * self._patch
        full = Ridge(self._regression(self.shape.width, outputs)).to(self.std_C.device)

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for tokens, pictures in batches():
                yield self._scaled(tokens), self._around(self._pixels(pictures))

        full.fit(pairs)
        weight_CO = full.weight[0].double()
        spread_OO = weight_CO.new_zeros(outputs, outputs)
        for tokens, _ in batches():
            scaled = self._scaled(tokens)
            predicted = ((scaled - scaled.mean(0)).double() @ weight_CO).flatten(0, 1)
            spread_OO.addmm_(predicted.T, predicted)
        principal_OR = torch.linalg.eigh(spread_OO).eigenvectors.flip(1)[:, : self.widest]
        directions_CR = weight_CO @ principal_OR
        return (directions_CR / directions_CR.norm(dim=0).clamp_min(1e-12)).float()

    @torch.no_grad()
    def draw(self, tokens_BNC: Tensor) -> Tensor:
        pixels_BPO = self.ridge.predict(self._inputs(tokens_BNC.to(self.std_C.device)))
        rows, columns = self.shape.grid
        patches = pixels_BPO.unflatten(2, (3, self.side, self.side)).unflatten(1, (rows, columns))
        picture = patches.permute(0, 3, 1, 4, 2, 5)
        return picture.reshape(-1, 3, rows * self.side, columns * self.side).clamp(0, 1)

    def _grid(self, tokens_BNC: Tensor) -> Tensor:
        return tokens_BNC[:, int(self.shape.cls) :].float()

    def _scaled(self, tokens_BNC: Tensor) -> Tensor:
        return self._grid(tokens_BNC.to(self.std_C.device)) / self.std_C

    def _inputs(self, tokens_BNC: Tensor) -> Tensor:
        return self._around(self._scaled(tokens_BNC) @ self.directions_CR)

    def _around(self, patches_BPC: Tensor) -> Tensor:
        """Return each patch with its eight neighbours, `[B, P, 9 C]`."""
        image = patches_BPC.transpose(1, 2).unflatten(2, self.shape.grid)
        image = F.pad(image, (1, 1, 1, 1), mode="replicate")
        return F.unfold(image, kernel_size=3).transpose(1, 2)

    def _pixels(self, pictures_B3HW: Tensor) -> Tensor:
        """Return each patch's pixels `[B, P, 3 side^2]`, of pictures resized where need be."""
        pictures = at_grid(pictures_B3HW.to(self.std_C), self.shape.grid, self.side)
        return F.unfold(pictures, kernel_size=self.side, stride=self.side).transpose(1, 2)


def at_grid(pictures_B3HW: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Resize pictures to `side` pixels per patch of a grid, averaging where they are larger."""
    size = (grid[0] * side, grid[1] * side)
    if pictures_B3HW.shape[-2:] == size:
        return pictures_B3HW
    return F.interpolate(pictures_B3HW, size, mode="bilinear", antialias=True)


def psnr(drawn_B3HW: Tensor, true_B3HW: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio `[B]` of pictures in 0..1, in dB."""
    error_B = (drawn_B3HW.double() - true_B3HW.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error_B.clamp_min(1e-10))


def fitted_readout(
    content_hash: str, shape: TokenShape, batches: Batches, folder: Path, side: int = 4
) -> Readout:
    """Return the read-out of a training split, fitting it where `folder` does not hold it yet.

    `content_hash` says all that decides what `batches` yields: passes over that split alone.
    """
    key = f"{VERSION}/{content_hash}/{shape}/{side}"
    file = folder / f"readout-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    readout = Readout(shape, side)
    load_or_fit(readout, file, lambda: readout.fit(batches))
    return readout.eval()
