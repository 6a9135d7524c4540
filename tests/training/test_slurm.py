"""The sbatch scripts against stand-ins of Slurm's commands: signals, requeueing, one directory.

The stand-ins do what Slurm's manual pages say: sbatch reads the #SBATCH lines and sets the job's
variables, srun starts the tasks and returns their largest exit code, scontrol requeues.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from blip3o_lit.base.launcher import port_is_free
from blip3o_lit.checkpoints.metrics_csv import read_rows

SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.max_steps=150", "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=75", "evaluation.images=20", "checkpoint.every=50"),
]

SBATCH = """#!/bin/bash
set -u
script=$1; shift
export SLURM_JOB_ID=$JOB SLURM_JOB_NAME=test SLURM_NNODES=1 SLURM_JOB_NODELIST=localhost
export SLURM_NTASKS_PER_NODE=2 SLURM_NTASKS=2 SLURM_CPUS_PER_TASK=8
export SLURM_ARRAY_JOB_ID=$JOB SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_MIN=0
export SLURM_ARRAY_TASK_COUNT=1
grep '^#SBATCH' "$script" > "$STATE/options"
for restart in 0 1 2; do
  [ "$restart" -gt 0 ] && export SLURM_RESTART_COUNT=$restart
  rm -f "$STATE/requeued"
  bash "$script" "$@"
  code=$?
  [ -e "$STATE/requeued" ] || exit $code
done
exit 99
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$STATE/srun"; shift; done
rm -f "$STATE/tasks"
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
  pids="${pids:-} $!"
done
echo $pids > "$STATE/tasks.new"; mv "$STATE/tasks.new" "$STATE/tasks"
worst=0
for pid in $pids; do
  wait "$pid"; code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case "$1" in
  show) echo "$3" ;;
  requeue) echo "$2" >> "$STATE/requests"; touch "$STATE/requeued" ;;
esac
"""


def free_job() -> str:
    """Return a job's number whose port, as scripts/train.sbatch derives it, is free here."""
    numbers = (random.randrange(1, 20000) for _ in range(100))
    return str(next(number for number in numbers if port_is_free(10000 + number)))


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Put the stand-ins on the PATH and return the environment."""
    folder, state = tmp_path / "bin", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STATE": str(state), "JOB": free_job()}
    return environment | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable}


@pytest.mark.timeout(900)
def test_job_is_requeued_on_the_signal_that_slurm_sends_and_goes_on(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    job_id, state = cluster["JOB"], Path(cluster["STATE"])
    run = tmp_path / "outputs" / "train" / job_id
    command = ["sbatch", str(ROOT / "scripts" / "train.sbatch"), *SMALL]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=cluster, stdout=log, stderr=log)
    while len(read_rows(run / "metrics.csv")) < 3:
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    asked = re.search(r"--signal=(\w+)@", (state / "options").read_text())
    assert asked is not None
    for pid in (state / "tasks").read_text().split():  # without B: it goes to the steps' tasks
        os.kill(int(pid), signal.Signals[f"SIG{asked[1]}"])
    assert job.wait(timeout=800) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert (state / "requests").read_text().split() == [job_id]
    assert "--cpus-per-task=8" in (state / "srun").read_text()  # srun doesn't inherit it
    assert "stopped at step" in said
    assert "requeueing it" in said
    assert "resume=auto goes on from" in said
    assert [path.name for path in run.parent.iterdir()] == [job_id], "one directory for all ranks"
    assert json.loads((run / "result.json").read_text())["finished"]
    steps = [int(row["step"]) for row in read_rows(run / "metrics.csv")]
    assert steps == list(range(1, 151))
    assert "2 ranks train one config" in (run / "train.log").read_text()


def test_out_of_time_extraction_worker_is_requeued(tmp_path: Path, cluster: dict[str, str]) -> None:
    state = Path(cluster["STATE"])
    waits = tmp_path / "python"  # a worker that takes its time at the first start
    waits.write_text('#!/bin/bash\n[ -n "${SLURM_RESTART_COUNT:-}" ] || exec sleep 60\necho "$@"\n')
    waits.chmod(stat.S_IRWXU)
    environment = cluster | {"PYTHON": str(waits)}
    command = ["sbatch", str(ROOT / "scripts" / "extract.sbatch"), "images=demo", "out=tokens"]
    job = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    while not (state / "tasks").exists():
        time.sleep(0.02)
    assert "--cpus-per-task=8" in (state / "srun").read_text()
    batch = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "--signal=B:USR1@" in (state / "options").read_text()
    tasks = (state / "tasks").read_text().split()
    os.kill(int(batch[0]), signal.SIGUSR1)  # with B: it goes to the script
    time.sleep(0.2)
    for pid in tasks:  # what requeueing does to the tasks
        os.kill(int(pid), signal.SIGKILL)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert (state / "requests").read_text().split() == [f"{cluster['JOB']}_0"]
    assert "-m blip3o_lit.extract images=demo out=tokens" in out


def test_words_of_a_job_win_and_a_restarted_one_goes_on_with_its_own(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    words = tmp_path / "python"  # a run that is preempted once
    words.write_text('#!/bin/bash\necho "${@:3}"\n[ -n "${SLURM_RESTART_COUNT:-}" ] || exit 75\n')
    words.chmod(stat.S_IRWXU)
    command = ["sbatch", str(ROOT / "scripts" / "train.sbatch"), "hydra.run.dir=a", "resume=b"]
    environment = cluster | {"PYTHON": str(words)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("hydra.run.dir=")]
    assert len(lines) == 4, "two tasks, started twice"
    for number, line in enumerate(lines):
        last = dict(word.split("=") for word in line)
        assert last["hydra.run.dir"] == "a"
        assert last["resume"] == ("b" if number < 2 else "auto")
    assert lines[0][:2] == [f"hydra.run.dir=outputs/train/{cluster['JOB']}", "resume=auto"]


def test_a_job_that_loses_ranks_is_requeued_while_it_gets_further(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    rank = tmp_path / "python"  # its second start gets further than the first, its third does not
    reached = r"printf 'step,loss\n10,1\n%s,1\n' $(( ${SLURM_RESTART_COUNT:-0} ? 30 : 20 ))"
    rank.write_text(f"#!/bin/bash\nmkdir -p lost\n{reached} > lost/metrics.csv\nexit 74\n")
    rank.chmod(stat.S_IRWXU)
    command = ["sbatch", str(ROOT / "scripts" / "train.sbatch"), "hydra.run.dir=lost"]
    environment = cluster | {"PYTHON": str(rank)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    said = [line for line in done.stdout.splitlines() if "lost a rank" in line]
    assert [line.split(": ")[0].split()[-1] for line in said] == ["20", "30"]
