"""Do generated tokens still mean what the picture means? Caption recall and zero-shot labels.

Every figure stands beside that of the true tokens, of a constant token and of chance.
Shape suffixes: B images, N target tokens, D target width, P embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.images.text import label_of
from blip3o_lit.metrics.retrieval import Retrieval, caption_ids
from blip3o_lit.models.baselines import Ridge
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.tokens.reading.reader import TokenReader

ReadOut = Callable[[Tensor], Tensor]
"""Raw target tokens [B, N, D] -> image embeddings [B, P]."""

FIT_IMAGES = 8192
"""Training images of the fitted read-out and of the class embeddings, at most."""
_BATCH = 64
_PAIR = 2
_UNLABELLED = -1


@dataclass
class Answers:
    """What one source of tokens answers: recall through each read-out, and guessed classes."""

    recall: dict[str, Retrieval] = field(default_factory=dict)
    guesses: dict[str, list[Tensor]] = field(default_factory=dict)


class ImageText:
    """Read-outs from target tokens to the space of captions, and the embeddings of classes.

    Classes are the store's class prompts where it has them, else means of training captions.
    A sample's label is a class's name, or its number from 0; where names are numbers, its name.
    Images without a caption take no part in recall.

    Args:
        held: The images that are scored.
        train: The training split, for the fitted read-out and the class embeddings.
        device: Where tokens are.
    """

    def __init__(self, held: TokenReader, train: TokenReader | None, device: torch.device) -> None:
        self.held, self.device = held, device
        self.read_outs: dict[str, ReadOut] = {}
        self.classes: tuple[list[str], Tensor] | None = None
        self.classes_from = "training captions"
        self.answers: dict[str, Answers] = {}
        self.labels: list[Tensor] = []
        self.strange: list[str] = []
        """Labels that name no class."""
        tower = tower_read_out(held, device)
        if tower is None:
            return
        self.read_outs["tower"] = tower
        if train is not None:
            fitted = fitted_read_out(train, device)
            if fitted is not None:
                self.read_outs["fitted"] = fitted
        stored = Classes.load(held.store.path)
        if stored is not None and stored.tower == held.store.index.arrays[held.target].tower:
            self.classes = stored.names, stored.text_KP.double().to(device)
            self.classes_from = "class prompts"
        elif train is not None:
            self.classes = class_embeddings(train, device)

    def add(self, tokens: dict[str, Tensor], ids: np.ndarray) -> None:
        """Add a batch of tokens `[B, N, D]` by source; all sources show the same images."""
        text_BP = self.held.text(ids) if self.read_outs else None
        if text_BP is None:
            return
        caption_B = caption_ids(self.held.captions(ids))
        if self.classes is not None:
            self._add_labels(self.held.metadata(ids), self.classes[0])
        for source, tokens_BND in tokens.items():
            answers = self.answers.setdefault(source, Answers())
            for name, read in self.read_outs.items():
                image_BP = F.normalize(read(tokens_BND).double(), dim=-1)
                recall = answers.recall.setdefault(name, Retrieval())
                recall.update(image_BP.cpu(), text_BP, caption_B)
                if self.classes is not None:
                    guess_B = (image_BP @ self.classes[1].T).argmax(1).cpu()
                    answers.guesses.setdefault(name, []).append(guess_B)
        chance = self.answers.setdefault("chance", Answers())
        constant = chance.recall.setdefault("tower", Retrieval())
        constant.update(torch.zeros_like(text_BP), text_BP, caption_B)

    def _add_labels(self, metadata: list[dict[str, Any]], names: list[str]) -> None:
        place = {label_of(name): number for number, name in enumerate(names)}
        if not any(name.isdecimal() for name in place):
            place |= {str(number): number for number in range(len(names))}
        place.pop("", None)
        labels = [label_of(item.get("label")) for item in metadata]
        self.labels.append(torch.tensor([place.get(label, _UNLABELLED) for label in labels]))
        self.strange += [label for label in labels if label and label not in place]

    def retrieval(self) -> dict[str, Any]:
        """Return recall by source and direction; those of the fitted read-out in `fitted`.

        `images` have a caption and are counted. Empty where none has one.
        """
        if not self.answers or not self.answers["chance"].recall["tower"].captioned:
            return {}
        tables = {
            name: {
                source: answers.recall[name].compute()
                for source, answers in self.answers.items()
                if name in answers.recall
            }
            for name in self.read_outs
        }
        table: dict[str, Any] = {
            "read_out": read_out_name(self.held),
            "images": self.answers["chance"].recall["tower"].captioned,
            **tables.pop("tower"),
        }
        return table | tables

    def zero_shot(self) -> dict[str, Any]:
        """Return top-1 accuracy by source, and how often a source agrees with the true tokens.

        `strange` labels name no class, and one of them is `strange_label`.
        """
        if not self.labels or self.classes is None:
            return {}
        label_B = torch.cat(self.labels)
        known = label_B != _UNLABELLED
        if not known.any() and not self.strange:
            return {}
        names = self.classes[0]
        result: dict[str, Any] = {
            "classes": len(names),
            "classes_from": self.classes_from,
            "images": int(known.sum()),
            "chance": 1 / len(names),
        }
        if self.strange:
            result |= {"strange": len(self.strange), "strange_label": self.strange[0]}
        if not known.any():
            return result
        for name in self.read_outs:
            rows = {
                source: torch.cat(answers.guesses[name])
                for source, answers in self.answers.items()
                if name in answers.guesses
            }
            result[name] = {
                source: {
                    "top1": float((guess_B == label_B)[known].double().mean()),
                    "agreement": float((guess_B == rows["true"]).double().mean()),
                }
                for source, guess_B in rows.items()
            }
        return result


def read_out_name(reader: TokenReader) -> str:
    """Return how the tower's own read-out works on a view: `cls` or `patch_mean`."""
    return "cls" if reader.shape.target.cls else "patch_mean"


def tower_read_out(reader: TokenReader, device: torch.device) -> ReadOut | None:
    """Return the tower's own read-out: CLS through its head, else the mean of projected patches.

    The mean is not what the tower was trained for. None where the store has no caption embeddings
    of the target's tower, or no head.
    """
    index = reader.store.index
    texts = [spec for spec in index.arrays.values() if spec.kind == "text"]
    if not texts or texts[0].tower != index.arrays[reader.target].tower:
        return None
    cls = reader.shape.target.cls
    if reader.mode.projected:
        return lambda tokens_BND: tokens_BND[:, 0] if cls else tokens_BND.mean(1)
    if not (Path(reader.store.path) / "heads.safetensors").is_file():
        return None
    head = reader.store.head(reader.target).to(device)
    return lambda tokens_BND: head(tokens_BND[:, :1])[:, 0] if cls else head(tokens_BND).mean(1)


def fitted_read_out(train: TokenReader, device: torch.device) -> ReadOut | None:
    """Fit a ridge from the mean true patch token to the tower's own image embedding.

    Where the store keeps no CLS token, the embedding of the caption, where there is one, takes the
    image's place. The fit sees true training tokens alone; on generated tokens it is used as it
    is. None where fewer than two images can be fitted.
    """
    store, name = train.store, train.target
    spec = store.index.arrays[name]
    width = next(s for s in store.index.arrays.values() if s.kind == "text").shape[0]
    whole = None
    if spec.cls and store.index.reduced is None:
        mode = ModeConfig("cls_patch", spec.projected)
        whole = TokenReader(store, train.split, name, name, mode)
    head = store.head(name).to(device) if whole is not None and not spec.projected else None
    first = int(train.shape.target.cls)
    ids = np.linspace(0, len(train) - 1, min(FIT_IMAGES, len(train))).round().astype(np.int64)
    if whole is None:
        ids = ids[captioned(train, ids)]
    if len(ids) < _PAIR:
        return None

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            pooled = train.read(part)["target"][:, first:].to(device).float().mean(1, keepdim=True)
            if whole is None:
                embedding = train.text(part)
                assert embedding is not None
                embedding = embedding[:, None].to(device)
            else:
                embedding = whole.read(part)["target"][:, :1].to(device)
                embedding = embedding.float() if head is None else head(embedding)
            yield pooled, F.normalize(embedding, dim=-1)

    shapes = (TokenShape((1, 1), False, size) for size in (train.shape.target.width, width))
    ridge = Ridge(PairShape(*shapes)).to(device)
    ridge.fit(batches)
    return lambda tokens_BND: ridge.predict(tokens_BND[:, first:].mean(1, keepdim=True))[:, 0]


def captioned(reader: TokenReader, ids: np.ndarray) -> np.ndarray:
    """Return whether each image has a caption `[B]`."""
    return np.array([bool(caption.strip()) for caption in reader.captions(ids)], dtype=bool)


def class_embeddings(train: TokenReader, device: torch.device) -> tuple[list[str], Tensor] | None:
    """Return class names and the mean caption embedding `[K, P]` of each label, fp64 unit norm.

    No picture takes part: a class is what the training captions of its label say. None where
    fewer than two labels occur.
    """
    sums: dict[str, Tensor] = {}
    for start in range(0, min(FIT_IMAGES, len(train)), _BATCH):
        ids = np.arange(start, min(start + _BATCH, FIT_IMAGES, len(train)))
        labels = [label_of(item.get("label")) for item in train.metadata(ids)]
        text_BP = train.text(ids)
        assert text_BP is not None
        unit_BP = F.normalize(text_BP.double(), dim=-1)
        for label, row, known in zip(labels, unit_BP, captioned(train, ids)):
            if label and known:
                sums[label] = sums.get(label, torch.zeros_like(row)) + row
    if len(sums) < 2:
        return None
    names = sorted(sums)
    stacked = torch.stack([sums[name] for name in names])
    return names, F.normalize(stacked, dim=-1).to(device)
