"""Recall against counting by hand, for equal captions, and for ties."""

import numpy as np
import pytest
import torch

from blip3o_lit.metrics.retrieval import Retrieval, caption_ids, recall


def scored(image: torch.Tensor, text: torch.Tensor, captions: list[str]) -> dict:
    metric = Retrieval()
    metric.update(image[:3], text[:3], caption_ids(captions[:3]))
    metric.update(image[3:], text[3:], caption_ids(captions[3:]))
    return metric.compute()


def test_recall_equals_sorting_in_numpy():
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(60, 8, generator=draw)
    image = text + 1.5 * torch.randn(60, 8, generator=draw)
    result = scored(image, text, [f"caption {i}" for i in range(60)])
    i, t = (x.double().numpy() for x in (image, text))
    i, t = (
        i / np.linalg.norm(i, axis=1, keepdims=True),
        t / np.linalg.norm(t, axis=1, keepdims=True),
    )
    for name, similarity in (("image_to_text", i @ t.T), ("text_to_image", t @ i.T)):
        order = np.argsort(-similarity, axis=1)
        for k in (1, 5, 10, 20):
            hits = [row in order[row, :k] for row in range(60)]
            assert result[name][f"R@{k}"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert 0 < result["image_to_text"]["R@1"] < result["image_to_text"]["R@20"]


def test_equal_captions_are_one_entry_and_each_of_their_images_a_hit():
    text = torch.eye(4)[[0, 0, 1, 2, 3]]
    image = torch.eye(4)[[0, 1, 1, 2, 3]]  # the second image looks like another caption
    result = scored(image, text, ["a", "a", "b", "c", "d"])
    assert result["image_to_text"]["R@1"] == pytest.approx(4 / 5)
    # "b" finds two images level, one of them its own.
    assert result["text_to_image"]["R@1"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_ties_score_what_a_random_order_scores():
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.5, 0.1]])
    relevant = torch.tensor([[False, True, False, True, False, True]])
    draws = np.random.default_rng(0)
    expected = []
    for k in (1, 2, 3, 4, 6):
        hits = 0
        for _ in range(4000):
            order = np.lexsort((draws.random(6), -scores[0].numpy()))
            hits += bool(relevant[0].numpy()[order[:k]].any())
        expected.append(hits / 4000)
    np.testing.assert_allclose(recall(scores, relevant, (1, 2, 3, 4, 6)), expected, atol=0.03)


def test_a_constant_embedding_scores_chance():
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(50, 8, generator=draw)
    constant = torch.randn(8, generator=draw).expand(50, 8)
    result = scored(constant, text, [str(i) for i in range(50)])
    assert result["text_to_image"]["R@5"] == pytest.approx(5 / 50, rel=1e-6)
    assert result["image_to_text"]["R@5"] == pytest.approx(5 / 50, rel=1e-6)


def test_captions_swapped_among_images_score_as_random_ones():
    """However well the true pairs find each other: a mean over shuffles is chance."""
    draw = torch.Generator().manual_seed(2)
    text = torch.randn(20, 8, generator=draw)
    image = text + 0.1 * torch.randn(20, 8, generator=draw)
    names = [str(number) for number in range(20)]
    assert scored(image, text, names)["image_to_text"]["R@1"] == 1
    found = []
    for _ in range(300):
        order = torch.randperm(20, generator=draw)
        result = scored(image, text[order], [names[number] for number in order])
        found.append([result[way]["R@5"] for way in ("image_to_text", "text_to_image")])
    np.testing.assert_allclose(np.mean(found, 0), 5 / 20, atol=0.02)
