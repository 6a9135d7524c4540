"""Words: the captions of an image as sequences of tokens, packed one after the other.

An array of kind `sequence` stores `[T, E]` per sample, T the sum of its captions' lengths; beside
it `<array>_lengths` says how long each caption is, int32 `[K]`, 0 behind the last.

Shape suffixes: S and B samples, K captions, T tokens of all captions of a sample, E width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import ArraySpec, lengths_array


def sequence_specs(
    name: str, longest: int, width: int, captions: int, dtype: str = "float16", tower: str = ""
) -> dict[str, ArraySpec]:
    """Return the specs of a sequence and its lengths: at most `captions` of at most `longest`."""
    words = ArraySpec("sequence", dtype, (longest, width), tower=tower)
    return {name: words, lengths_array(name): ArraySpec("lengths", "int32", (captions,))}


def packed(
    name: str, captions: Sequence[np.ndarray], specs: Mapping[str, ArraySpec]
) -> dict[str, np.ndarray]:
    """Return what a store takes for a sequence: its captions `[L_k, E]`, none to K of them."""
    lengths_K = np.zeros(specs[lengths_array(name)].shape, np.int32)
    if len(captions) > len(lengths_K):
        raise UserError(
            f"{len(captions)} captions of an image, the store takes {len(lengths_K)} of {name}"
        )
    lengths_K[: len(captions)] = [len(caption) for caption in captions]
    rows = [*captions] or [np.empty((0, specs[name].shape[1]), np.float32)]
    return {name: np.concatenate(rows), lengths_array(name): lengths_K}


def chosen(
    lengths_BK: np.ndarray, draw_B: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which caption of each sample is read, where it starts, and how long it is: `[B]` each.

    `draw_B` lies from 0 to below 1; without it the first is.
    """
    lengths_BK, rows = lengths_BK.astype(np.int64), np.arange(len(lengths_BK))
    caption_B = np.zeros(len(rows), np.int64)
    if draw_B is not None:
        caption_B = (draw_B * (lengths_BK > 0).sum(1)).astype(np.int64)
    length_B = lengths_BK[rows, caption_B]
    return caption_B, lengths_BK.cumsum(1)[rows, caption_B] - length_B, length_B


def faulty(lengths_SK: np.ndarray, tokens_S: np.ndarray, longest: int) -> np.ndarray:
    """Return which samples have lengths that can't be: `[S]`.

    Captions are 1 to `longest` long, zeros stand behind the last, and the sum is what is stored.
    """
    lengths_SK = lengths_SK.astype(np.int64)
    out_of_range = ((lengths_SK < 0) | (lengths_SK > longest)).any(1)
    gap = ((lengths_SK[:, :-1] == 0) & (lengths_SK[:, 1:] != 0)).any(1)
    return out_of_range | gap | (lengths_SK.sum(1) != tokens_S)


def check_sequence(
    name: str,
    value: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    specs: Mapping[str, ArraySpec],
    key: str,
) -> None:
    """Refuse a sequence of another width, or with lengths that don't describe it."""
    (longest, width), lengths_K = specs[name].shape, arrays[lengths_array(name)]
    if value.ndim != 2 or value.shape[1] != width:
        raise UserError(
            f"sample {key}: {name} has shape {list(value.shape)}, the store holds [any, {width}]"
        )
    if lengths_K.ndim != 1 or faulty(lengths_K[None], np.array([len(value)]), longest)[0]:
        raise UserError(
            f"sample {key}: {lengths_array(name)} {lengths_K.tolist()} don't describe the "
            f"{len(value)} tokens of {name} (1 to {longest} a caption, zeros behind the last)"
        )
