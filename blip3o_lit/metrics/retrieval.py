"""Recall at k between image embeddings and caption embeddings.

Equal captions are one entry of the gallery, and every image that carries it is a hit for it. An
empty caption is none: its image neither asks nor is found. Ties count as a random order does, so
that a constant image embedding scores what chance scores.
Shape suffixes: B images, P embedding width, Q queries, G gallery, U distinct captions.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

DEPTHS = (1, 5, 10, 20)
NO_CAPTION = -1
_CHUNK = 1024


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Return a 63-bit fingerprint per caption `[B]`, NO_CAPTION where it is blank."""
    return torch.tensor([_caption_id(caption) for caption in captions], dtype=torch.long)


def _caption_id(caption: str) -> int:
    if not caption.strip():
        return NO_CAPTION
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") >> 1


def recall(scores_QG: Tensor, relevant_QG: Tensor, depths: Sequence[int] = DEPTHS) -> list[float]:
    """Return the expected share of queries with a relevant entry among the first k, for each k.

    With g entries above a query's best relevant one and t level with it, r of them relevant, the
    k - g places left are filled at random: P(hit) = 1 - C(t - r, k - g) / C(t, k - g).
    """
    best_Q1 = scores_QG.masked_fill(~relevant_QG, -torch.inf).amax(1, keepdim=True)
    above = (scores_QG > best_Q1).sum(1).double()
    level_QG = scores_QG == best_Q1
    ties = level_QG.sum(1).double()
    misses = ties - (level_QG & relevant_QG).sum(1)

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    shares = []
    for depth in depths:
        places = (depth - above).clamp(min=0).minimum(ties)
        fits = places.minimum(misses)
        missed = torch.exp(log_choose(misses, fits) - log_choose(ties, fits))
        missed = torch.where(places > misses, 0.0, missed)
        shares.append(float((1 - missed).mean()))
    return shares


class Retrieval(Metric):
    """Recall at 1, 5, 10 and 20, image to text and text to image."""

    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    caption: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("image", "text", "caption"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, image_BP: Tensor, text_BP: Tensor, caption_B: Tensor) -> None:
        self.image.append(F.normalize(image_BP.double(), dim=-1))
        self.text.append(F.normalize(text_BP.double(), dim=-1))
        self.caption.append(caption_B)

    @property
    def captioned(self) -> int:
        return int((dim_zero_cat(self.caption) != NO_CAPTION).sum())

    def compute(self) -> dict[str, dict[str, float]]:
        """Return recall by direction and depth; empty where no image has a caption."""
        caption_B = dim_zero_cat(self.caption)
        known_B = caption_B != NO_CAPTION
        if not known_B.any():
            return {}
        image_BP, text_BP = dim_zero_cat(self.image)[known_B], dim_zero_cat(self.text)[known_B]
        caption_B = caption_B[known_B]
        # NumPy alone says where each distinct caption stands first.
        unique = np.unique(caption_B.cpu(), return_index=True, return_inverse=True)
        first_U, member_B = (torch.from_numpy(part).to(caption_B.device) for part in unique[1:])
        entry_U = torch.arange(len(first_U), device=caption_B.device)
        text_UP = text_BP[first_U]
        return {
            "image_to_text": _recalls(image_BP, text_UP, member_B, entry_U),
            "text_to_image": _recalls(text_UP, image_BP, entry_U, member_B),
        }


def _recalls(query_QP: Tensor, entry_GP: Tensor, query_Q: Tensor, entry_G: Tensor) -> dict:
    """Return recall by depth; a gallery entry with the query's id is relevant."""
    totals = [0.0] * len(DEPTHS)
    for start in range(0, len(query_Q), _CHUNK):
        rows = slice(start, start + _CHUNK)
        # Equal embeddings may differ in the last bits of a blocked product: round them level.
        scores = (query_QP[rows] @ entry_GP.T).round(decimals=9)
        shares = recall(scores, query_Q[rows, None] == entry_G)
        totals = [total + share * len(scores) for total, share in zip(totals, shares)]
    return {f"R@{k}": total / len(query_Q) for k, total in zip(DEPTHS, totals)}
