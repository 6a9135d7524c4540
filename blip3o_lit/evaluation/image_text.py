"""Do generated tokens still mean what the picture means? Caption recall and zero-shot labels.

Every number stands beside that of the true tokens, of a constant token and of chance.
Shape suffixes: B images, N target tokens, D target width, P embedding width, K classes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.utilities import dim_zero_cat

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.images.text import label_of
from blip3o_lit.metrics.retrieval import NO_CAPTION, Retrieval, caption_ids
from blip3o_lit.models.baselines import Ridge
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.tokens.reading.order import evenly
from blip3o_lit.tokens.reading.reader import TokenReader

ReadOut = Callable[[Tensor], Tensor]
"""Raw target tokens [B, N, D] -> image embeddings [B, P]."""

FIT_IMAGES = 8192
"""Training images of the fitted read-out and of the class embeddings, at most."""
_BATCH = 64
_UNLABELLED = -1


class ImageText:
    """Read-outs from target tokens to the space of captions, and the embeddings of classes.

    Classes are the store's class prompts where it has them, else means of training captions.
    A sample's label is a class's name, or its number from 0; where names are numbers, its name.
    With `compares` the similarity to the own caption is told beside the recall, and by which
    read-out: `cls`, `fitted` or, as the last resort of a tower that pools by CLS, `patch_mean`.
    """

    def __init__(
        self,
        held: TokenReader,
        train: TokenReader | None,
        device: torch.device,
        compares: bool = False,
    ) -> None:
        self.held, self.compares = held, compares
        self.read_outs: dict[str, ReadOut] = {}
        self.classes: tuple[list[str], Tensor] | None = None
        self.classes_from = "training captions"
        # By read-out, then by source of the tokens.
        self.recall: dict[str, dict[str, Retrieval]] = defaultdict(lambda: defaultdict(Retrieval))
        self.guesses: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.labels: list[Tensor] = []
        self.strange: list[str] = []
        """Labels that name no class."""
        tower = tower_read_out(held, device)
        if tower is None:
            return
        self.read_outs["tower"] = tower
        fitted = None if train is None else fitted_read_out(train, device)
        if fitted is not None:
            self.read_outs["fitted"] = fitted
        prompts = Classes.load(held.store.path)
        if prompts is not None and prompts.tower == held.store.index.arrays[held.target].tower:
            self.classes = prompts.names, prompts.text_KP.double().to(device)
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
            for name, read in self.read_outs.items():
                image_BP = F.normalize(read(tokens_BND).double(), dim=-1)
                self.recall[name][source].update(image_BP.cpu(), text_BP, caption_B)
                if self.classes is not None:
                    guess_B = (image_BP @ self.classes[1].T).argmax(1).cpu()
                    self.guesses[name][source].append(guess_B)
        self.recall["tower"]["chance"].update(torch.zeros_like(text_BP), text_BP, caption_B)

    def _add_labels(self, metadata: list[dict[str, Any]], names: list[str]) -> None:
        number_of = {label_of(name): number for number, name in enumerate(names)}
        if not any(name.isdecimal() for name in number_of):
            number_of |= {str(number): number for number in range(len(names))}
        number_of.pop("", None)
        labels = [label_of(item.get("label")) for item in metadata]
        numbers = [number_of.get(label, _UNLABELLED) for label in labels]
        self.labels.append(torch.tensor(numbers))
        self.strange += [label for label in labels if label and label not in number_of]

    def retrieval(self) -> dict[str, Any]:
        """Return recall by source and direction; those of the fitted read-out in `fitted`.

        `images` have a caption and are counted. Empty where none has one.
        """
        if not self.recall or not self.recall["tower"]["chance"].captioned:
            return {}
        tables = {
            name: {source: recall.compute() for source, recall in sources.items()}
            for name, sources in self.recall.items()
        }
        read_out = "cls" if self.held.shape.target.cls else "patch_mean"
        images = self.recall["tower"]["chance"].captioned
        result = {"read_out": read_out, "images": images, **tables.pop("tower"), **tables}
        if self.compares:
            result["similarity_by"] = "fitted" if self.nearest == "fitted" else read_out
            result["similarity"] = self._similarity()
        return result

    @property
    def nearest(self) -> str:
        """The read-out that comes nearest to how the tower itself embeds a picture.

        A tower that pools by CLS was not trained for a mean of its patches: where a run has no CLS,
        what was fitted to the store's CLS embeddings stands in, and without it the mean is left.
        """
        stands_in = not self.held.shape.target.cls and _keeps_cls(self.held)
        return "fitted" if stands_in and "fitted" in self.read_outs else "tower"

    def _similarity(self) -> dict[str, float]:
        """Return the mean cosine of each source's embedding to that of its own caption.

        `chance` is that of true tokens to the caption of another image.
        """
        found = {}
        for source, recall in self.recall[self.nearest].items():
            if source == "chance":
                continue
            caption_B = dim_zero_cat(recall.caption)
            known_B = caption_B != NO_CAPTION
            image_BP, text_BP = (dim_zero_cat(x)[known_B] for x in (recall.image, recall.text))
            found[source] = float((image_BP * text_BP).sum(-1).mean())
            if source == "true" and len(text_BP) > 1:
                other_B = caption_B[known_B].roll(1) != caption_B[known_B]
                chance_B = (image_BP * text_BP.roll(1, 0)).sum(-1)[other_B]
                found |= {"chance": float(chance_B.mean())} if len(chance_B) else {}
        return found

    def zero_shot(self) -> dict[str, Any]:
        """Return top-1 accuracy by source, and how often a source agrees with the true tokens.

        `strange` labels name no class, and one of them is `strange_label`.
        """
        if not self.labels or self.classes is None:
            return {}
        label_B = torch.cat(self.labels)
        known_B = label_B != _UNLABELLED
        if not known_B.any() and not self.strange:
            return {}
        classes = len(self.classes[0])
        result: dict[str, Any] = {
            "classes": classes,
            "classes_from": self.classes_from,
            "images": int(known_B.sum()),
            "chance": 1 / classes,
        }
        if self.strange:
            result |= {"strange": len(self.strange), "strange_label": self.strange[0]}
        if not known_B.any():
            return result
        for name, sources in self.guesses.items():
            guesses = {source: torch.cat(parts) for source, parts in sources.items()}
            result[name] = {
                source: {
                    "top1": float((guess_B == label_B)[known_B].double().mean()),
                    "agreement": float((guess_B == guesses["true"]).double().mean()),
                }
                for source, guess_B in guesses.items()
            }
        return result


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

    Where the store keeps no CLS token, the embedding of the caption takes the image's place. None
    where fewer than two images can be fitted.
    """
    ids = evenly(len(train), FIT_IMAGES)
    if _keeps_cls(train):
        embed = _tower_embedding(train, device)
    else:
        embed, ids = train.text, ids[captioned(train, ids)]
    if len(ids) < 2:
        return None
    first = int(train.shape.target.cls)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            patches_BND = train.read(part)["target"][:, first:].to(device).float()
            embedding_BP = embed(part)
            assert embedding_BP is not None
            embedding_B1P = F.normalize(embedding_BP.to(device), dim=-1)[:, None]
            yield patches_BND.mean(1, keepdim=True), embedding_B1P

    width = next(s for s in train.store.index.arrays.values() if s.kind == "text").shape[0]
    pooled = TokenShape((1, 1), False, train.shape.target.width)
    ridge = Ridge(PairShape(pooled, TokenShape((1, 1), False, width))).to(device)
    ridge.fit(batches)
    return lambda tokens_BND: ridge.predict(tokens_BND[:, first:].mean(1, keepdim=True))[:, 0]


def _keeps_cls(reader: TokenReader) -> bool:
    """Whether a store has the CLS tokens of the target's tower."""
    index = reader.store.index
    return index.arrays[reader.target].cls and index.reduced is None


def _tower_embedding(train: TokenReader, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Return what gives the tower's own image embeddings `[B, P]` of ids, by its CLS token."""
    store, name = train.store, train.target
    projected = store.index.arrays[name].projected
    whole = train.viewed(name, name, ModeConfig("cls_patch", projected))
    head = None if projected else store.head(name).to(device)

    def embed(ids: np.ndarray) -> Tensor:
        cls_B1D = whole.read(ids)["target"][:, :1].to(device)
        return (cls_B1D.float() if head is None else head(cls_B1D))[:, 0]

    return embed


def captioned(reader: TokenReader, ids: np.ndarray) -> np.ndarray:
    return np.array([bool(caption.strip()) for caption in reader.captions(ids)], dtype=bool)


def class_embeddings(train: TokenReader, device: torch.device) -> tuple[list[str], Tensor] | None:
    """Return class names and the mean caption embedding `[K, P]` of each label, fp64 unit norm.

    None where fewer than two labels occur.
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
