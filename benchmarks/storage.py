"""What each number format costs: cosine to fp32 tokens, bytes a sample, a trained model's cosine.

Two kinds of tokens: heavy-tailed random ones of CLIP's shape, and those of the demo's towers. On
these, the same small model (same seed, same order) is trained once a format, and scored against
the fp32 tokens of held-out scenes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import result
from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    PrecisionConfig,
    TrainerConfig,
)
from blip3o_lit.extraction.demo import demo_source
from blip3o_lit.extraction.engine import extract
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as
from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter
from blip3o_lit.towers import demo
from blip3o_lit.training.run import run_training

SAMPLES = 48
SPEC = ArraySpec("tokens", "float32", (257, 1024), cls=True, grid=(16, 16))
TARGETS = {"float16": 0.999999, "bfloat16": 0.99999, "int8": 0.9995}
SCENES, HELD_OUT, STEPS = 512, 128, 80
"""Of the demo's part: a minute of two cores, long enough to beat the mean token by far."""
LOSS = 0.002
"""Cosine that a trained model may lose by a format."""
MEAN = SolverConfig("mean")


def tokens(seed: int) -> np.ndarray:
    """Return heavy-tailed `[257, 1024]` tokens; as in CLIP, a few channels are 30 times wider."""
    rng = np.random.default_rng(seed)
    width = np.exp(np.random.default_rng(0).normal(0, 0.4, 1024))
    width[:6] *= 30
    out = rng.standard_t(6, (257, 1024)) * width + 0.5 * width
    out[0] *= 1.5
    return out.astype(np.float32)


def synthetic(folder: Path) -> list[dict[str, Any]]:
    """Write random tokens in fp32, recode them, and compare with what was written."""
    results = []
    with TokenWriter(folder / "fp32", {"eva": SPEC, "clip": SPEC}) as writer:
        for number in range(SAMPLES):
            arrays = {"eva": tokens(number), "clip": tokens(number + SAMPLES)}
            writer.add("train", f"{number:06d}", arrays)
    store, ids = TokenStore.open(folder / "fp32"), np.arange(SAMPLES)
    mode = ModeConfig("cls_patch")
    true = TokenReader(store, "train", mode=mode).read(ids)["target"].double()
    print("  random tokens, 257 x 1024, two arrays")
    for storage, target in TARGETS.items():
        index = copy_as(store, folder / storage, storage)
        reader = TokenReader(TokenStore.open(folder / storage), "train", mode=mode)
        cosine = mean_cosine(reader.read(ids)["target"], true)
        size = sum(shard.bytes for shard in index.shards) / SAMPLES
        kind = index.arrays["clip"].scale or ""
        print(f"  {storage:<9} {kind:<8} cosine {cosine:.7f}  {size / 1e6:.3f} MB a sample")
        results.append(result(f"storage/{storage}_cosine", cosine, "", target))
    return results


def trained(folder: Path) -> list[dict[str, Any]]:
    """Train the same model on the demo's tokens in each format; score against fp32 tokens."""
    engine = EngineConfig(batch_size=16, threads=1, device="cpu")
    config = ExtractConfig(images="demo", storage="float32", extract=engine)
    towers = {name: demo.load(name) for name in demo.NAMES}
    extract(demo_source(SCENES, HELD_OUT), towers, folder / "float32", config)
    store, ids = TokenStore.open(folder / "float32"), np.arange(HELD_OUT)
    true = TokenReader(store, "validation").read(ids)["target"]
    results, scores, lines = [], {}, []
    for storage in ("float32", *TARGETS):
        if storage != "float32":
            copy_as(store, folder / storage, storage)
        run_training(training(folder / storage), folder / f"run-{storage}", [])
        translator = load(folder / f"run-{storage}").translator
        batch = TokenReader(TokenStore.open(folder / storage), "validation").read(ids)
        made = [
            translator.generate(batch["condition"][part], torch.from_numpy(part), 0, MEAN).x1_BND
            for part in np.array_split(ids, 8)
        ]
        scores[storage] = mean_cosine(torch.cat(made), true)
        stored = mean_cosine(batch["target"], true)
        lost = scores["float32"] - scores[storage]
        model = f"{scores[storage]:.5f} ({0 - lost:+.5f})"
        lines.append(f"{storage:<9} tokens {stored:.7f}  model {model}")
        if storage != "float32":
            results.append(result(f"storage/{storage}_model_loses", lost, "", LOSS, "lower"))
    print("  demo tokens, and the model trained on them", *lines, sep="\n  ")
    return results


def training(store: Path) -> TrainConfig:
    """Return a short run on a store."""
    return TrainConfig(
        model=ModelConfig(width=128, depth=2, heads=2, kv_heads=2, mlp_width=256),
        data=DataConfig(name="tokens", tokens=str(store)),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=10, ema_decay=0.95),
        precision=PrecisionConfig("fp32"),
        trainer=TrainerConfig(max_steps=STEPS, log_every=STEPS, accelerator="cpu"),
        evaluation=EvaluationConfig(every=STEPS, images=16),
        checkpoint=CheckpointConfig(every=STEPS),
        logger=LoggerConfig(tensorboard=False),
        batch_size=16,
    )


def mean_cosine(made: torch.Tensor, true: torch.Tensor) -> float:
    """Return the mean cosine over tokens and images."""
    return float(torch.cosine_similarity(made.double(), true.double(), dim=-1).mean())


def run() -> list[dict[str, Any]]:
    """Measure both."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "random").mkdir()
        return [*synthetic(Path(name) / "random"), *trained(Path(name))]
