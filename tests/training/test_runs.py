"""A run's folder is its own: which launch gets which folder, and what a start does with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.cli.run_stamp import run_stamp
from blip3o_lit.train import main

SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.max_steps=4", "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=2", "evaluation.images=20", "checkpoint.every=2", "checkpoint.keep=-1"),
]
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "MASTER_")


def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the train command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["train", *SMALL, *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and bytes of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def seeds(folder: Path) -> set[int]:
    """Return the seeds of all checkpoints of a run directory."""
    files = checkpointing.files_of(folder)
    return {checkpointing.about(file)["config"]["seed"] for file in files}


def same_weights(one: Path, other: Path) -> bool:
    a, b = (checkpointing.load(run / "checkpoints" / "last.ckpt") for run in (one, other))
    return all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())


def is_whole(folder: Path) -> bool:
    """Whether a run directory holds one run from its first to its last step."""
    steps = [int(row["step"]) for row in read_rows(folder / "metrics.csv")]
    result = json.loads((folder / "result.json").read_text())
    return steps == [1, 2, 3, 4] and result["finished"] and result["step"] == 4


def assert_paths_exist(said: str, root: Path) -> None:
    """Every path that was printed is there."""
    for path in re.findall(rf"{root}[^\s'\"]*", said):
        assert Path(path.rstrip(".,:")).exists(), path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """Two finished runs, `seven` and `eight`, and `killed`: what a kill leaves of `seven`."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(shared_home))
        for name, seed in (("seven", 7), ("eight", 8)):
            assert train(patch, f"seed={seed}", f"hydra.run.dir={root / name}") == 0
    shutil.copytree(root / "seven", root / "killed")
    for name in ("result.json", "history.json"):
        (root / "killed" / name).unlink()
    for name in ("best.ckpt", "last.ckpt", "step-00000004.ckpt"):
        (root / "killed" / "checkpoints" / name).unlink()
    return root


EARLIER = ("fresh", "killed", "finished")
PLACES = ("same", "sibling", "used")
HOW = {
    ("fresh", "same", "null"): "whole",
    ("fresh", "same", "auto"): "whole, and says that it starts fresh",
    ("fresh", "same", "path"): "refused: no such checkpoint",
    ("fresh", "sibling", "null"): "whole",
    ("fresh", "sibling", "auto"): "whole, and says that it starts fresh",
    ("fresh", "sibling", "path"): "refused: no such checkpoint",
    ("killed", "same", "null"): "refused: holds a run already",
    ("killed", "same", "auto"): "goes on",
    ("killed", "same", "path"): "goes on",
    ("killed", "sibling", "null"): "whole",
    ("killed", "sibling", "auto"): "whole, and says that it starts fresh",
    ("killed", "sibling", "path"): "goes on",
    ("finished", "same", "null"): "refused: holds a run already",
    ("finished", "same", "auto"): "says that it is finished",
    ("finished", "same", "path"): "says that it is finished",
    ("finished", "sibling", "null"): "whole",
    ("finished", "sibling", "auto"): "whole, and says that it starts fresh",
    ("finished", "sibling", "path"): "refused: it is at step 4 already",
    **{(earlier, "used", "null"): "refused: holds a run already" for earlier in EARLIER},
    **{(earlier, "used", "auto"): "refused: seed was 8 there" for earlier in EARLIER},
    **{(earlier, "used", "path"): "refused: holds a run already" for earlier in EARLIER},
}
"""Earlier run, folder of this one, `resume` -> what a start has to do."""


@pytest.mark.parametrize(
    ("earlier", "place", "resume"), product(EARLIER, PLACES, ("null", "auto", "path"))
)
def test_what_a_start_does_with_its_folder(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    earlier: str,
    place: str,
    resume: str,
) -> None:
    own = tmp_path / "own"
    if earlier != "fresh":
        shutil.copytree(runs / {"finished": "seven"}.get(earlier, earlier), own)
    shutil.copytree(runs / "eight", tmp_path / "used")
    folder = own if place == "same" else tmp_path / place
    before, others = content(folder), content(tmp_path)
    files = checkpointing.files_of(own)
    path = files[-1] if files else own / "checkpoints" / "last.ckpt"
    word = {"path": f"resume={path}"}.get(resume, f"resume={resume}")
    code = train(monkeypatch, "seed=7", word, f"hydra.run.dir={folder}")
    said = capfd.readouterr()
    what, _, reason = HOW[earlier, place, resume].partition(": ")
    if what == "refused":
        assert code == 2
        assert reason in said.err
        assert len(said.err.splitlines()) == 1, said.err
        assert content(folder) == before
    else:
        assert code == 0, said.err
        assert_paths_exist(said.out, tmp_path)
        assert f"run directory: {folder}" in said.out
        assert re.search(rf"next: .*ckpt={folder}/checkpoints/best\.ckpt", said.out)
        assert is_whole(folder)
        assert same_weights(folder, runs / "seven")
        assert seeds(folder) == {7}
    assert ("starting fresh" in said.out) == ("starts fresh" in what)
    assert ("resumes from" in said.out) == (what == "goes on")
    assert ("this run is finished, at step 4" in said.out) == (what == "says that it is finished")
    if "finished" in what:
        assert content(folder) == before
        score = json.loads((folder / "result.json").read_text())["best"]["cosine"]
        assert f"best: {score:.4f} at step" in said.out
    elsewhere = {name: file for name, file in others.items() if not name.startswith(f"{folder}/")}
    now = content(tmp_path)
    assert {name: now[name] for name in elsewhere} == elsewhere, "other runs are left alone"


def test_a_finished_run_goes_on_to_more_steps(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(runs / "seven", tmp_path / "run"))
    words = ("seed=7", "resume=auto", f"hydra.run.dir={folder}")
    assert train(monkeypatch, *words, "trainer.max_steps=6") == 0
    assert [int(row["step"]) for row in read_rows(folder / "metrics.csv")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_began_from_another_is_not_restarted_from_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start = runs / "killed" / "checkpoints" / "step-00000002.ckpt"
    words = ("seed=7", f"hydra.run.dir={tmp_path}")
    assert train(monkeypatch, *words, f"resume={start}") == 0
    shutil.rmtree(tmp_path / "checkpoints")  # as a crash of the node before its first checkpoint
    assert train(monkeypatch, *words, "resume=auto") == 0
    assert f"it began from {start}" in capfd.readouterr().out
    assert same_weights(tmp_path, runs / "seven")


@pytest.mark.parametrize("word", ["fp32", "bf16"])
def test_precision_auto_keeps_to_the_format_that_a_run_began_in(
    word: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"hydra.run.dir={tmp_path}"
    assert train(monkeypatch, run, f"precision={word}", "trainer.max_steps=2") == 0
    assert train(monkeypatch, run, "precision=auto", "resume=auto") == 0
    saved = checkpointing.read_lazily(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 4
    assert saved["blip3o"]["config"]["precision"]["name"] == word


def test_damage_alone_is_no_reason_to_start_over(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(runs / "killed", tmp_path / "run"))
    for file in checkpointing.files_of(folder):
        file.write_bytes(file.read_bytes()[:-100])
    before = content(folder)
    assert train(monkeypatch, "seed=7", "resume=auto", f"hydra.run.dir={folder}") == 2
    assert "step-00000002.ckpt, but no sound step or last checkpoint" in capfd.readouterr().err
    assert content(folder) == before


def test_other_tokens_are_refused_before_anything_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(runs / "killed", tmp_path / "run"))
    before = content(folder)
    words = ("seed=7", "resume=auto", f"hydra.run.dir={folder}", "data.linear_gaussian.images=80")
    assert train(monkeypatch, *words) == 2
    assert "it was trained on other data" in capfd.readouterr().err
    assert content(folder) == before


def test_overwrite_removes_what_the_earlier_run_wrote_and_nothing_else(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(runs / "seven", tmp_path / "run"))
    (folder / "report.html").write_text("of the earlier run")
    foreign = [folder / "notes.txt", folder / "checkpoints" / "mine.ckpt"]
    for file in foreign:
        file.write_text("a user's own")
    words = (f"hydra.run.dir={folder}", "overwrite=true")
    for _ in range(2):
        assert train(monkeypatch, "seed=8", "checkpoint.every=4", *words) == 0, "as make demo does"
    names = {path.name for path in checkpointing.files_of(folder)}
    assert names == {"best.ckpt", "last.ckpt", "mine.ckpt", "step-00000004.ckpt"}
    assert same_weights(folder, runs / "eight")
    assert is_whole(folder)
    assert not (folder / "report.html").exists()
    assert {file.read_text() for file in foreign} == {"a user's own"}
    (folder / "environment.json").unlink()
    before = content(folder)
    assert train(monkeypatch, "seed=8", *words) == 2
    assert train(monkeypatch, "seed=8", "resume=auto", *words) == 2
    said = capfd.readouterr().err.splitlines()
    assert "no environment.json as every run has" in said[0]
    assert "overwrite=true starts afresh, resume=auto goes on" in said[1]
    assert content(folder) == before


def test_pruning_leaves_step_files_of_others(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(runs / "killed", tmp_path / "run"))
    foreign = [f"step-{step:08d}.ckpt" for step in (1, 3)]
    for name in foreign:
        shutil.copy2(
            runs / "eight" / "checkpoints" / "step-00000002.ckpt", folder / "checkpoints" / name
        )
        os.utime(folder / "checkpoints" / name, (1, 1))
    words = ("seed=7", "resume=auto", f"hydra.run.dir={folder}", "trainer.max_steps=8")
    assert train(monkeypatch, *words, "checkpoint.every=1", "checkpoint.keep=1") == 0
    steps = {path.name for path in checkpointing.files_of(folder) if "step" in path.name}
    # 2 was saved with keep=-1, and 3 is the run's own by now.
    assert steps == {foreign[0], "step-00000002.ckpt", "step-00000008.ckpt"}


def test_a_sweep_that_is_started_again_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("-m", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert train(monkeypatch, *words) == 0
    jobs = [tmp_path / "sweep" / name for name in "01"]
    shutil.rmtree(jobs[1])
    before = content(jobs[0])
    capfd.readouterr()
    assert train(monkeypatch, *words, "resume=auto") == 0
    assert "this run is finished, at step 4" in capfd.readouterr().out
    assert content(jobs[0]) == before
    assert is_whole(jobs[1])


def command(words: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a Python in a folder, without this process's launcher variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_runs_at_once_in_one_slurm_job_are_two_folders(tmp_path: Path) -> None:
    words = ["-m", "blip3o_lit.train", *SMALL]
    job = {"SLURM_JOB_ID": "4712", "SLURM_JOB_NAME": "bash"}
    both = [command(words, tmp_path, **job) for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said
    folders = list((tmp_path / "outputs" / "train").iterdir())
    assert len(folders) == 2
    assert all(is_whole(folder) for folder in folders)


def stamps(monkeypatch: pytest.MonkeyPatch, ranks: int, **variables: str) -> set[str]:
    """Return the names that the ranks of one srun come to."""
    found = set()
    for rank in range(ranks):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setenv("SLURM_PROCID", str(rank))
            found.add(run_stamp())
    return found


def test_tasks_of_an_srun_agree_and_no_two_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    job = {"SLURM_JOB_ID": "4712", "SLURM_NTASKS": "8"}
    tasks = job | {"SLURM_STEP_NUM_TASKS": "8"}
    launches = [
        stamps(monkeypatch, 8, **tasks, SLURM_STEP_ID="0"),
        stamps(monkeypatch, 8, **tasks, SLURM_STEP_ID="1"),
        stamps(monkeypatch, 8, **tasks, SLURM_STEP_ID="0", SLURM_RESTART_COUNT="1"),
    ]
    assert [len(names) for names in launches] == [1, 1, 1]
    # A shell inside the job, or inside `srun --pty`: no other task has to agree.
    shell = job | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    launches += [stamps(monkeypatch, 1, **given) for given in (job, shell, job, shell, {}, {})]
    assert len(set.union(*launches)) == len(launches)


def test_ranks_of_torchrun_agree_and_no_two_launches_do(tmp_path: Path) -> None:
    # One torchrun may start two runs in a row, and two may have one run id and one port.
    # A file per rank: what two processes print on one pipe may be mixed within a line.
    code = """
import os
from pathlib import Path
from blip3o_lit.cli.run_stamp import run_stamp
Path("rank" + os.environ["RANK"]).write_text(run_stamp() + " " + run_stamp())
"""
    (tmp_path / "names.py").write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", place]
    launches = []
    for _ in range(2):
        process = command([*words, "--rdzv-id=fixed", "names.py"], tmp_path)
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said
        first, second = (tmp_path / f"rank{rank}" for rank in range(2))
        assert first.read_text("utf-8") == second.read_text("utf-8"), "the ranks agree"
        launches += first.read_text("utf-8").split()
        first.unlink()
        second.unlink()
    assert len(set(launches)) == 4


def test_torchrun_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    left = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    process = command(["-m", "blip3o_lit.train", *SMALL], tmp_path, **left, **place)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 2, said
    assert re.fullmatch(r"error: torchrun's variables .* 127\.0\.0\.1:1 .*hydra\.run\.dir\n", said)
