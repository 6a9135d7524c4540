"""Runs in processes of their own that are killed, stopped or told something at a file access.

Each is forked from a server that has the imports done, so a start costs no more than the training
itself. A run is disturbed at a given file access, not at a given time, so tests mean the same on a
busy machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from quick_run import differences, state

from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.training.run import run_training

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["blip3o_lit.training.run", "disturbed"])


@dataclass(frozen=True)
class Disturbance:
    """At the `count`th access to a file with `part` in its path, send `number` to `ranks`.

    A delay in seconds of the process's own time makes it SIGPROF to this rank: it ends the process
    as SIGKILL does, between any two machine instructions.
    """

    part: str
    count: int
    number: int = signal.SIGKILL
    ranks: tuple[int, ...] = (0,)
    delay: float = 0.0

    def install(self, folder: Path) -> None:
        """Watch this process's files from now on."""
        seen = 0

        def look(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event not in ("open", "os.rename", "os.link") or self.part not in str(arguments[0]):
                return
            seen += 1
            if seen == self.count and self.delay:
                signal.setitimer(signal.ITIMER_PROF, self.delay)
            elif seen == self.count:
                pids = json.loads((folder / "pids.json").read_text())
                for rank in self.ranks:
                    os.kill(pids[rank], self.number)

        sys.addaudithook(look)


def train_here(
    wanted: TrainConfig, folder: Path, environment: dict[str, str], planned: Disturbance | None
) -> None:
    """What a forked process does: one rank of a run, its words in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    said = (folder / f"said-{environment.get('LOCAL_RANK', '0')}.txt").open("a", buffering=1)
    sys.stdout = said
    os.dup2(said.fileno(), 2)
    while not (folder / "pids.json").is_file():
        time.sleep(0.001)
    if planned and environment.get("LOCAL_RANK", "0") == "0":
        planned.install(folder)
    run_training(wanted, folder, [])


def run(
    folder: Path, *wanted: TrainConfig, planned: Disturbance | None = None, **variables: str
) -> list[int | None]:
    """Run a job whose ranks have these configs to its end; returns the exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pids.json").unlink(missing_ok=True)
    environments = [{"BLIP3O_HOME": os.environ["BLIP3O_HOME"], **variables} for _ in wanted]
    if len(wanted) > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank, own in enumerate(environments):
            own |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        SERVER.Process(target=train_here, args=(one, folder, own, planned))
        for one, own in zip(wanted, environments, strict=True)
    ]
    for process in processes:
        process.start()
    temporary = folder / "pids.json.tmp"
    temporary.write_text(json.dumps([process.pid for process in processes]))
    temporary.replace(folder / "pids.json")
    for process in processes:
        if planned and planned.number == signal.SIGSTOP and process is not processes[0]:
            process.kill()
        process.join(280)
    return [process.exitcode for process in processes]


def assert_same_end(straight: Path, disturbed: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (state(folder / "checkpoints" / name) for folder in (straight, disturbed))
        assert differences(a, b) == []
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight, disturbed)]
    assert results[0]["best"] == results[1]["best"]
    assert results[0]["validation"] == results[1]["validation"]
    columns = ("step", "train/loss", "val/cosine")
    rows = [
        [[row[column] for column in columns] for row in read_rows(folder / "metrics.csv")]
        for folder in (straight, disturbed)
    ]
    assert rows[0] == rows[1]
