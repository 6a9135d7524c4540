"""What one rank finds out and tells the others, before their process group stands."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import torch

from blip3o_lit.base.launcher import launch
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.sharded import PLAIN, measure
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.statistics import cached_standardizers
from blip3o_lit.training.cluster import first_rank

SHAPE = PairShape(TokenShape((2, 2), False, 6), TokenShape((2, 2), False, 4))


def sharded_checkpoint(folder: Path, step: int) -> Path:
    """Write a folder as two ranks would, of 4 files of bytes."""
    path = folder / "checkpoints" / f"step-{step:08d}.ckpt"
    path.mkdir(parents=True)
    for number in range(4):
        (path / f"{number}.safetensors").write_bytes(bytes([step, number]) * 500)
    own = {"format": checkpointing.FORMAT, "config": {}, "shape": {}, "tokens": {}}
    sums = {file.name: measure(file) for file in path.glob("*.safetensors")}
    torch.save({"blip3o": own, "files": sums}, path / PLAIN)
    os.utime(path, (step, step))
    return path


def be_a_rank(rank: int, port: str, folder: Path, homes: list[str], done: Barrier) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"TORCHELASTIC_RUN_ID": "first", "BLIP3O_HOME": homes[rank]}
    opened, found = [], dict[str, Any]()
    sys.addaudithook(lambda event, words: opened.append(str(words[0])) if event == "open" else None)
    ranks = first_rank(launch(), layouts.config("ddp"), 1)
    sound, damaged = checkpointing.newest_to_resume(folder, ranks)
    found["resume"] = [sound and sound.name, [path.name for path in damaged]]
    found["read"] = sorted({Path(path).name for path in opened if path.endswith(".safetensors")})

    def batches() -> list[dict[str, torch.Tensor]]:
        found["measured"] = True
        draw = torch.Generator().manual_seed(0)
        return [
            {
                s: torch.randn(8, 4, w, generator=draw)
                for s, w in zip(("condition", "target"), (6, 4))
            }
        ]

    scales = cached_standardizers("tokens", SHAPE, 8, batches, ranks)
    found["std"] = [float(scale.std_NC.sum()) for scale in scales.values()]
    found["answer"] = ranks.finds(lambda: f"of rank {rank}")
    try:
        checkpointing.check_sound(folder / "none.ckpt", ranks)
    except UserError as error:
        found["refused"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    done.wait(120)  # the first rank serves the store


def test_one_rank_decides_and_measures_and_each_verifies_its_share(tmp_path: Path) -> None:
    """With a cache folder for each, as on two machines."""
    for step in (1, 2, 3):
        sharded_checkpoint(tmp_path, step)
    cut = tmp_path / "checkpoints" / "step-00000003.ckpt" / "1.safetensors"  # of rank 1's share
    cut.write_bytes(cut.read_bytes()[:-1])
    os.utime(cut.parent, (3, 3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    homes = [str(tmp_path / name) for name in ("home 0", "home 1")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layouts"])  # so that packages are imported once
    done = context.Barrier(2)
    ranks = [
        context.Process(target=be_a_rank, args=(rank, port, tmp_path, homes, done))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(280)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["resume"] == other["resume"] == ["step-00000002.ckpt", ["step-00000003.ckpt"]]
    assert (one["read"], other["read"]) == (
        ["0.safetensors", "2.safetensors"],
        ["1.safetensors", "3.safetensors"],
    )
    assert (one.get("measured"), other.get("measured")) == (True, None)
    assert one["std"] == other["std"]
    assert np.isfinite(one["std"]).all()
    assert one["answer"] == other["answer"] == "of rank 0"
    assert one["refused"] == other["refused"] == f"{tmp_path / 'none.ckpt'}: no such checkpoint"
