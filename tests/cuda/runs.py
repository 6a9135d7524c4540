"""Whole runs of 8 steps on the shim: runs.py FOLDER LAYOUT/PRECISION/OPTIMIZER/MICRO ...

A layout is single, ddp, fsdp2, compile, words or compile-words; the last two have words beside the
grid.

Prints a JSON: for each run the host's waits in three quiet steps, the copies from memory that is
not pinned, and the steps done. Kernels do nothing, so all values are zeros.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import layouts
import torch
from lightning import Callback
from on_shim import Trace
from PIL import Image
from small_words import write_words
from torch._dynamo.utils import counters

import blip3o_lit.training.trainer as trainer_module
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.extract import SplitConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    PrecisionConfig,
    StrategyConfig,
    TrainerConfig,
)
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.models.network import Network
from blip3o_lit.training.run import run_training

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
MODEL = ModelConfig(width=16, depth=2, heads=2, kv_heads=1, mlp_width=16)


class Probe(Callback):
    """Traces the steps 5 to 7 of a run that logs, validates and saves in steps 4 and 8."""

    def __init__(self):
        self.quiet = Trace()

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4 and not self.quiet.kernels:
            self.quiet.__enter__()

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            self.quiet.__exit__()


def run(folder, layout, precision, optimizer, micro):
    probe, tokens = Probe(), layouts.config("1")
    if layout in ("images", "kept"):
        tokens.data, tokens.split = pictures(folder, layout), SplitConfig("content", 0.4)
    model = replace(MODEL, compile="compile" in layout)
    if "words" in layout:
        store = folder.parent / layouts.WORDS
        if not store.exists():
            write_words(store, train=72, validation=20)
        data = DataConfig(tokens=str(store), condition=["eva", "words"])
        solver = SolverConfig("euler", steps=2, guidance_scale=2.0)
        tokens = replace(tokens, data=data, flow=FlowConfig(condition_dropout=0.2), solver=solver)
        model = replace(model, conditioning="cross")
    config = replace(
        tokens,
        model=model,
        precision=PrecisionConfig(precision),
        optimizer=OptimizerConfig(optimizer, muon_layers="tokens"),
        strategy=StrategyConfig(layout if layout in ("ddp", "fsdp2") else "single"),
        trainer=TrainerConfig(
            max_steps=8, log_every=4, accelerator="cuda", devices=str(WORLD), max_bad_steps=10**6
        ),
        evaluation=EvaluationConfig(every=4, images=20),
        checkpoint=CheckpointConfig(every=4, keep=-1),
        micro_batch_size=int(micro),
    )
    build = trainer_module.Callbacks.__init__

    def probed(self, *args):
        build(self, *args)
        self.in_order.append(probe)

    trainer_module.Callbacks.__init__ = probed
    counters.clear()
    torch._dynamo.reset()
    try:
        run_training(config, folder, [])
    finally:
        trainer_module.Callbacks.__init__ = build
    return {
        "waits": probe.quiet.waits,
        "pageable": probe.quiet.lines("h2d pageable"),
        "pinned": sum(probe.quiet.lines("h2d pinned").values()),
        "kernels": sum(probe.quiet.kernels.values()),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "saved": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


def pictures(folder, layout):
    """Draw pictures, which the towers encode on the imitated device."""
    source = folder.parent / f"{layout} pictures"
    source.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(48):
        pixels = torch.randint(256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(source / f"{number}.png")
    keep = str(folder.parent / "keep") if layout == "kept" else None
    return DataConfig("images", images=str(source), keep=keep)


def compile_without_kernels():
    """Leave Inductor out: Triton would compile each kernel for real, which takes minutes."""
    compile_blocks = Network.compile_blocks
    Network.compile_blocks = lambda self: compile_blocks(self, "aot_eager")


def scores_of_zeros():
    """Give scores a value where that of zeros has none."""
    made = TokenScores.__init__

    def init(self, *args, **further):
        made(self, *args, **further)  # torchmetrics wraps compute in here
        inner = self.compute

        def compute():
            try:
                return inner()
            except (ValueError, ZeroDivisionError):
                if self._is_synced:
                    self.unsync()
                names = ("cosine", "cosine_centred", "mse", "r2", "norm_ratio")
                return dict.fromkeys(names, 0.5) | {"cosine_ci95": [0.4, 0.6]}

        self.compute = compute

    TokenScores.__init__ = init


def main():
    scores_of_zeros()
    compile_without_kernels()
    folder, found = Path(sys.argv[1]), {}
    for word in sys.argv[2:]:
        found[word] = run(folder / word.replace("/", "-"), *word.split("/"))
    print("JSON", json.dumps(found))


if __name__ == "__main__":
    main()
