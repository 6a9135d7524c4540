"""Attention to words: a null token, tokens of a grid if any, words, and where to look.

The null token comes first and is never masked, so that an image without any word has something to
attend to; words come last, so that a mask is one comparison with their number.

Shape suffixes: B batch, M grid tokens, L words, E their width, W network width, K head width,
T = 1 + M + L keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_lit.base.condition import Condition


def words_alone(condition: Condition) -> Tensor:
    """Return the words with zeros in the padding, whatever lay there: [B, L, E]."""
    return condition.words.masked_fill(~condition.present[..., None], 0)


def mean_word(tokens_BLW: Tensor, condition: Condition) -> Tensor:
    """Return the mean of the tokens at which a condition has words, [B, W] in fp32.

    It is 0 where there are none.
    """
    present_BLW = tokens_BLW.masked_fill(~condition.present[..., None], 0)
    sum_BW = present_BLW.sum(1, dtype=torch.promote_types(tokens_BLW.dtype, torch.float32))
    return sum_BW / condition.length.clamp_min(1)[:, None]


def joined(null_W: Tensor, grid_BMW: Tensor | None, words_BLW: Tensor) -> Tensor:
    """Return the tokens to attend to, [B, T, W]: the null token, those of a grid, words."""
    null_B1W = null_W.to(words_BLW.dtype).expand(len(words_BLW), 1, -1)
    parts = [null_B1W, words_BLW] if grid_BMW is None else [null_B1W, grid_BMW, words_BLW]
    return torch.cat(parts, 1)


def key_mask(length_B: Tensor, words: int, keys: int) -> Tensor:
    """Return where to attend: bool [B, 1, 1, T]; `keys` is T, the last `words` of them L."""
    keys_T = torch.arange(keys, device=length_B.device)
    return (keys_T < (keys - words + length_B)[:, None])[:, None, None]


def key_rope(rope: Tensor | None, words: int) -> Tensor | None:
    """Return a rotary table [2, M, 1, K] of a grid with rows that turn neither null nor words."""
    if rope is None:
        return None
    rows = (0, 0, 0, 0, 1, words)
    return torch.cat((F.pad(rope[:1], rows, value=1.0), F.pad(rope[1:], rows)))
