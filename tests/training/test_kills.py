"""Runs that are killed or preempted again and again, and end as undisturbed ones do."""

from __future__ import annotations

import json
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from disturbed import Disturbance, assert_same_end, run
from quick_run import config

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    StrategyConfig,
    TrainerConfig,
)


def long_config(steps: int, devices: int = 1, asynchronous: bool = False) -> TrainConfig:
    """Many quick steps, each of them saved, every fourth validated."""
    return replace(
        config(resume="auto"),
        trainer=TrainerConfig(steps, log_every=1, accelerator="cpu", devices=str(devices)),
        strategy=StrategyConfig("ddp" if devices > 1 else "single"),
        checkpoint=CheckpointConfig(every=1, keep=2, asynchronous=asynchronous),
        evaluation=EvaluationConfig(every=4, images=20),
    )


def step_reached(folder: Path) -> int:
    rows = read_rows(folder / "metrics.csv")
    return int(rows[-1]["step"]) if rows else 0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.soak)])
def test_killed_run_ends_as_an_undisturbed_one(
    tmp_path: Path, kills: int, asynchronous: bool
) -> None:
    assert run(tmp_path / "a" / "straight", long_config(14 + 6 * kills)) == [0]
    wanted = long_config(14 + 6 * kills, asynchronous=asynchronous)
    folder, draw = tmp_path / "b" / "killed", random.Random(kills)
    for number in range(kills):
        delay = 0.05 * draw.random() if number % 2 else 0.0
        planned = Disturbance("/checkpoints/", draw.randint(3, 25), delay=delay)
        ended = run(folder, wanted, planned=planned)
        assert ended in ([-signal.SIGKILL], [-signal.SIGPROF]), (folder / "said-0.txt").read_text()
        found, damaged = checkpointing.newest_to_resume(folder)
        assert damaged == []
        assert found is not None or number == 0
    assert run(folder, wanted) == [0]
    assert_same_end(tmp_path / "a" / "straight", folder)
    hidden = [path.name for path in (folder / "checkpoints").glob(".*")]
    assert hidden == [], "nothing half-written is left"


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.soak)])
def test_ranks_killed_in_an_asynchronous_sharded_save_lose_that_save_alone(
    tmp_path: Path, kills: int
) -> None:
    """All ranks at once, at some file of the save of every third step."""
    one = long_config(4 + 3 * kills, 2, asynchronous=True)
    both = [replace(one, strategy=StrategyConfig("fsdp2"))] * 2
    assert run(tmp_path / "a" / "straight", *both) == [0, 0]
    folder, draw = tmp_path / "b" / "killed", random.Random(kills)
    for number in range(kills):
        step = 3 + 3 * number
        planned = Disturbance(f".step-{step:08d}.ckpt.tmp", draw.randint(1, 4), ranks=(1, 0))
        assert run(folder, *both, planned=planned) == [-signal.SIGKILL] * 2
        found, damaged = checkpointing.newest_to_resume(folder)
        assert (checkpointing.step_of(found or folder), damaged) == (step - 1, [])
    assert run(folder, *both) == [0, 0]
    assert_same_end(tmp_path / "a" / "straight", folder)


SIGNALS = [
    (signal.SIGUSR2, (1,)),
    (signal.SIGTERM, (0, 1)),
    *((number, ranks) for number in (signal.SIGTERM, signal.SIGUSR2) for ranks in ((0,), (1,))),
    *((number, (0, 1)) for number in (signal.SIGUSR1, signal.SIGUSR2)),
]


@pytest.mark.parametrize("count", [2, pytest.param(len(SIGNALS), marks=pytest.mark.soak)])
def test_preempted_ranks_save_exit_for_a_requeue_and_go_on(tmp_path: Path, count: int) -> None:
    steps = 10 + 5 * count
    both = [long_config(steps, 2)] * 2
    assert run(tmp_path / "a" / "straight", *both) == [0, 0]
    folder, before = tmp_path / "b" / "preempted", 0
    for number, ranks in SIGNALS[:count]:
        planned = Disturbance("/metrics.csv", 5, number, ranks)
        assert run(folder, *both, planned=planned) == [75, 75], number
        last = checkpointing.load(folder / "checkpoints" / "last.ckpt")["global_step"]
        assert before < last < steps
        said = (folder / "said-0.txt").read_text()
        assert f"stopped at step {last}" in said
        assert "to go on, add to the same command: resume=" in said
        assert not json.loads((folder / "result.json").read_text())["finished"]
        before = last
    assert "stopped at step" not in (folder / "said-1.txt").read_text(), "rank 0 speaks"
    assert run(folder, *both) == [0, 0]
    assert_same_end(tmp_path / "a" / "straight", folder)


def test_ranks_with_different_configs_stop(tmp_path: Path) -> None:
    one, other = long_config(4, 2), long_config(4, 2)
    other.optimizer = replace(other.optimizer, lr=2 * one.optimizer.lr)
    assert run(tmp_path, one, other) == [1, 1]
    for rank in range(2):
        said = (tmp_path / f"said-{rank}.txt").read_text()
        assert "rank 1 trains another config or other tokens than rank 0" in said
    assert step_reached(tmp_path) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_one_line(
    tmp_path: Path, number: signal.Signals
) -> None:
    planned = Disturbance("/metrics.csv", 5, number, (1,))
    both = [
        replace(
            long_config(20, 2),
            evaluation=EvaluationConfig(every=20, images=20),
            strategy=StrategyConfig("ddp", timeout=20.0),
        )
    ] * 2
    assert run(tmp_path, *both, planned=planned) == [1, -signal.SIGKILL]
    line = (tmp_path / "said-0.txt").read_text()
    assert re.search(
        r"another rank died, or did not answer for strategy\.timeout=20 seconds: rank 0 lost it in "
        r"step \d+ \(.+\)(; stacks .+)?; resume=auto goes on from the last checkpoint",
        line,
    ), line
    found, damaged = checkpointing.newest_to_resume(tmp_path)
    assert found is not None
    assert damaged == [], "nothing is lost"
