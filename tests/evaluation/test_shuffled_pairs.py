"""A translator trained on pairs that don't belong together learns the mean token and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_run import small_config

from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.data import DataConfig, LinearGaussianConfig
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.trainer import EvaluationConfig, TrainerConfig
from blip3o_lit.evaluation.readers import open_readers
from blip3o_lit.evaluation.score import Scorer
from blip3o_lit.testbeds.linear_gaussian import linear_gaussian_store
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.shards import TokenWriter
from blip3o_lit.training.run import run_training

PROBLEM = LinearGaussianConfig(
    images=2048, validation_images=128, grid=2, condition_width=6, target_width=4
)


def shuffled(store: Path, out: Path) -> Path:
    """Write a store whose images have the condition of another image of their split."""
    source = TokenStore.open(store)
    specs = {name: source.index.arrays[name] for name in ("eva", "clip")}
    with TokenWriter(out, specs) as writer:
        for split in ("train", "validation"):
            reader = TokenReader(source, split)
            batch = reader.read(np.arange(len(reader)))
            other = np.random.default_rng(0).permutation(len(reader))
            pairs = zip(batch["condition"].numpy()[other], batch["target"].numpy())
            for number, (eva, clip) in enumerate(pairs):
                writer.add(split, f"{split}-{number:06d}", {"eva": eva, "clip": clip})
    return out


@pytest.mark.parametrize("pairs", ["true", "shuffled"])
def test_only_true_pairs_beat_the_mean_token(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / "home"))
    store = linear_gaussian_store(PROBLEM)
    if pairs == "shuffled":
        store = shuffled(store, tmp_path / "shuffled")
    config = small_config()
    config.data = DataConfig(name="tokens", tokens=str(store))
    config.trainer = TrainerConfig(max_steps=150, accelerator="cpu")
    config.optimizer = OptimizerConfig(lr=1e-2, warmup_steps=10)
    config.evaluation = EvaluationConfig(every=1000, images=16)
    config.batch_size = 64
    config.logger.tensorboard = False
    run_training(config, tmp_path / "run", [])
    settings = EvaluateConfig(ckpt=str(tmp_path / "run"), device="cpu", solvers=[], curve=[])
    loaded = load(settings.ckpt)
    readers = open_readers(loaded, settings)
    scorer = Scorer(loaded, *readers, settings, tmp_path / "fits", lambda *_: None)
    scores = scorer.run()["estimators"]["mean"]
    if pairs == "true":
        assert scores["r2"] > 0.4
    else:
        assert scores["r2"] == pytest.approx(0, abs=0.05)
        assert scores["cosine_centred"] == pytest.approx(0, abs=0.1)
