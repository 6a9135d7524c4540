"""Where things land on a machine of 8 devices: places.py FOLDER prints a JSON.

The layouts of plain command lines, and the devices of extraction's copies and of its event.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import layouts
import torch
from on_shim import listen

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.machine import this_machine
from blip3o_lit.budget.placement import resolve
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.trainer import PrecisionConfig, StrategyConfig, TrainerConfig
from blip3o_lit.extraction.encoding import TowerSet
from blip3o_lit.extraction.engine import device_of
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.training.run import run_training


class Layer(Tower):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 8)
        self.info = TowerInfo("layer", TokenShape((2, 2), False, 8), image_size=4)

    def preprocess(self, image):
        return torch.zeros(3, 4, 4)

    def tokens(self, images_B3SS):
        return self.layer(images_B3SS.reshape(len(images_B3SS), 4, 12))

    def heads(self):
        return {}, {}


def extraction():
    towers = TowerSet({"eva": Layer(), "clip": Layer()}, captions=False, device="cuda:3")
    pixels = dict.fromkeys(("eva", "clip"), torch.zeros(3, 4, 4))
    seen = {"copy_on": [], "event_record": []}
    listen(lambda what, name, size: seen[what].append(size) if what in seen else None)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (towers.encode([pixels, pixels], ["", ""]), towers.mark())).result()
    listen(None)
    return seen


def tasks():
    """Return the devices that extraction takes as one of srun's tasks, and of torchrun's."""
    task = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}
    task |= {"SLURM_PROCID": "13", "SLURM_LOCALID": "5", "SLURM_NODEID": "1"}
    os.environ |= task
    by_srun = device_of("auto")
    os.environ |= {"LOCAL_RANK": "3"}
    by_torchrun = device_of("cuda")
    for name in (*task, "LOCAL_RANK"):
        del os.environ[name]
    return [by_srun, by_torchrun, device_of("auto")]


def layout(folder, strategy, devices):
    config = replace(
        layouts.config("1"),
        strategy=StrategyConfig(strategy),
        trainer=TrainerConfig(max_steps=2, accelerator="auto", devices=devices),
        precision=PrecisionConfig("bf16"),
        micro_batch_size=None,
        batch_size=64,
        dry_run=True,
    )
    run_training(config, folder, [])
    shape = PairShape(TokenShape((4, 4), False, 6), TokenShape((4, 4), False, 4))
    place = resolve(config, shape, this_machine("auto"))
    return [place.strategy, place.world, place.micro_batch]


def out_of_memory(folder):
    """Return what a run says that has a thousandth of the memory, and the snapshots it leaves."""
    torch.cuda.set_per_process_memory_fraction(1e-5)
    config = replace(layouts.config("1"), batch_size=64, micro_batch_size=32)
    config.trainer = TrainerConfig(
        max_steps=2, accelerator="cuda", devices="1", memory_history=True
    )
    try:
        run_training(config, folder / "out of memory", [])
    except UserError as error:
        said = str(error)
    torch.cuda.set_per_process_memory_fraction(1.0)
    files = (folder / "out of memory" / "profile").iterdir()
    return [said, {file.name: file.stat().st_size for file in files}]


found = {"extraction": extraction(), "tasks": tasks(), "layouts": {}}
for words in ("auto auto", "ddp auto", "fsdp2 auto", "auto 8", "single auto"):
    found["layouts"][words] = layout(Path(sys.argv[1]), *words.split())
found["out of memory"] = out_of_memory(Path(sys.argv[1]))
print("JSON", json.dumps(found))
