"""TokenScores against plain NumPy, on zero vectors, with masks and over two processes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.metrics.cosine import TokenScores, interval

SHAPE = TokenShape((2, 3), True, 5)


def tokens(seed: int, images: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(7, 5, generator=draw)
    true = mean + torch.randn(images, 7, 5, generator=draw)
    generated = 0.7 * true + 0.5 * torch.randn(images, 7, 5, generator=draw)
    return generated, true, mean


def numpy_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def test_every_score_equals_numpy():
    generated, true, mean = tokens(0)
    metric = TokenScores(mean, SHAPE)
    metric.update(generated[:5], true[:5])
    metric.update(generated[5:], true[5:])
    scores = metric.compute()
    g, t, m = (x.double().numpy() for x in (generated, true, mean))
    cos = numpy_cosine(g, t)
    image = cos.mean(1)
    expected = {
        "images": 17,
        "cosine": cos.mean(),
        "cosine_centred": numpy_cosine(g - m, t - m).mean(),
        "cosine_pooled": numpy_cosine(g[:, 1:].mean(1), t[:, 1:].mean(1)).mean(),
        "cosine_patch": cos[:, 1:].mean(),
        "cosine_cls": cos[:, 0].mean(),
        "image_std": image.std(ddof=1),
        "p5": np.percentile(image, 5),
        "p50": np.median(image),
        "p95": np.percentile(image, 95),
        "min": image.min(),
        "max": image.max(),
        "above_0.7": (image > 0.7).mean(),
        "above_0.8": (image > 0.8).mean(),
        "above_0.9": (image > 0.9).mean(),
        "tokens_above_0.7": (cos > 0.7).mean(),
        "tokens_above_0.9": (cos > 0.9).mean(),
        "mse": ((g - t) ** 2).mean(),
        "l2": np.sqrt(((g - t) ** 2).sum(-1)).mean(),
        "snr_db": 10 * np.log10((t**2).sum() / ((g - t) ** 2).sum()),
        "r2": 1 - ((g - t) ** 2).sum() / ((t - m) ** 2).sum(),
        "norm_ratio": np.linalg.norm(g, axis=-1).mean() / np.linalg.norm(t, axis=-1).mean(),
        "norm_consistency": 1
        - abs(1 - np.linalg.norm(g, axis=-1).mean() / np.linalg.norm(t, axis=-1).mean()),
        "variance_ratio": ((g - m) ** 2).sum() / ((t - m) ** 2).sum(),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-12), name
    np.testing.assert_allclose(scores["position_cosine"], cos[:, 1:].mean(0).reshape(2, 3))
    np.testing.assert_allclose(scores["position_std"], cos[:, 1:].std(0).reshape(2, 3), atol=1e-7)
    assert scores["cosine_ci95"][0] < scores["cosine"] < scores["cosine_ci95"][1]


def test_without_cls_every_token_is_a_patch():
    shape = TokenShape((1, 7), False, 5)
    generated, true, mean = tokens(1)
    metric = TokenScores(mean, shape)
    metric.update(generated, true)
    scores = metric.compute()
    assert scores["cosine_cls"] is None
    assert scores["cosine_patch"] == pytest.approx(scores["cosine"], rel=1e-12)


def test_zero_vectors_and_one_image_stay_finite():
    metric = TokenScores(torch.zeros(7, 5), SHAPE)
    metric.update(torch.zeros(1, 7, 5), torch.zeros(1, 7, 5))
    scores = metric.compute()
    numbers = [v for v in scores.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()
    assert scores["cosine"] == 0
    assert scores["r2"] is None
    assert scores["norm_ratio"] is None


def test_constant_generation_is_centred_away_and_low_precision_input_is_summed_in_float64():
    _, true, mean = tokens(2, 400)
    metric = TokenScores(mean, SHAPE)
    metric.update(mean.expand(400, 7, 5), true.half())
    scores = metric.compute()
    assert scores["cosine_centred"] == 0
    assert scores["r2"] == pytest.approx(0, abs=1e-12)
    assert metric.sum_error.dtype == torch.float64


def test_padded_images_do_not_count():
    generated, true, mean = tokens(3)
    padded, plain = TokenScores(mean, SHAPE), TokenScores(mean, SHAPE)
    valid = torch.arange(17) < 11
    padded.update(generated, true, valid)
    plain.update(generated[:11], true[:11])
    assert padded.compute() == plain.compute()


def test_interval_agrees_with_the_normal_one_for_many_images():
    values = np.random.default_rng(0).normal(0.8, 0.1, 4000)
    low, high = interval(values)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.12)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.3 * half)


def test_mean_token_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="mean token"):
        TokenScores(torch.zeros(6, 5), SHAPE)


def _rank(rank: int, cut: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generated, true, mean = tokens(4)
    metric = TokenScores(mean, SHAPE)
    valid = torch.arange(17) < cut if rank == 0 else torch.arange(17) >= cut
    metric.update(generated, true, valid)
    torch.save(metric.compute(), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("cut", [11, 17], ids=["shared", "second-has-padding-alone"])
def test_two_processes_give_what_one_gives(tmp_path, cut):
    mp.spawn(_rank, (cut, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)  # type: ignore
    generated, true, mean = tokens(4)
    metric = TokenScores(mean, SHAPE)
    metric.update(generated, true)
    alone = metric.compute()
    for rank in range(2):
        scores = torch.load(f"{tmp_path}/out.{rank}", weights_only=True)
        for name, value in alone.items():
            np.testing.assert_allclose(scores[name], value, rtol=1e-12, err_msg=name)
