"""The bad day of a run: full and slow disks, folders in use, clocks that jump, secrets on show."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
from children import NOBODY, in_child
from conftest import ROOT
from lightning import LightningModule, Trainer
from quick_run import config, differences, state

from blip3o_lit.base.files import claimed
from blip3o_lit.base.secrets import masked
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.checkpoints.resume import refuse_used, resolve_resume
from blip3o_lit.config.errors import UserError
from blip3o_lit.training.callbacks.slow_data import SlowData
from blip3o_lit.training.run import run_training


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    os.environ["BLIP3O_HOME"] = str(shared_home)
    folder = tmp_path_factory.mktemp("straight")
    run_training(config(), folder, [])
    return folder


def same_end(straight: Path, folder: Path) -> bool:
    a, b = (state(run / "checkpoints" / "last.ckpt") for run in (straight, folder))
    return differences(a, b) == []


def stopped_at(straight: Path, step: int, folder: Path) -> Path:
    """A run directory as a kill after that step would leave it."""
    (folder / "checkpoints").mkdir(parents=True)
    name = f"checkpoints/step-{step:08d}.ckpt"
    return Path(shutil.copyfile(straight / name, folder / name))


def test_a_full_disk_stops_training_and_loses_nothing(straight: Path, tmp_path: Path) -> None:
    saved = stopped_at(straight, 4, tmp_path)
    room = saved.stat().st_size // 2

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(UserError, match=r"the checkpoint could not be written.*free disk"):
            run_training(config(resume="auto"), tmp_path, [])

    in_child(work)
    assert checkpointing.newest_to_resume(tmp_path) == (saved, [])
    assert not list((tmp_path / "checkpoints").glob(".*")), "no half file"
    run_training(config(resume="auto"), tmp_path, [])
    assert same_end(straight, tmp_path)


def test_a_run_directory_that_cannot_be_written_is_named(
    open_folder: Path,
    tmp_path: Path,
) -> None:
    open_folder.chmod(0o555)

    def work() -> None:
        with (
            pytest.raises(UserError, match=f"hydra.run.dir={open_folder}/run: Permission denied"),
            claimed(open_folder / "run", "hydra.run.dir"),
        ):
            pass

    in_child(work, NOBODY)
    (tmp_path / "file").touch()
    words = ["-m", "blip3o_lit.train", f"hydra.run.dir={tmp_path}/file/run"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: .*/file/run: Not a directory: .*hydra\.run\.dir\n", done.stderr)


@pytest.mark.parametrize("closed", ["step-00000004.ckpt", "last.ckpt", ""])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged_or_missing(
    straight: Path,
    open_folder: Path,
    closed: str,
) -> None:
    for step in (2, 4):
        stopped_at(straight, step, open_folder / str(step))
    saved = [next((open_folder / step / "checkpoints").iterdir()) for step in "24"]
    run = open_folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    for number, file in enumerate(saved):
        os.utime(file.rename(run / "checkpoints" / file.name), (number, number))
    os.link(run / "checkpoints" / saved[1].name, run / "checkpoints" / "last.ckpt")
    (run / "checkpoints" / closed).chmod(0o000)
    run.chmod(0o777)

    def work() -> None:
        reason = (
            r"can't be read \(Permission denied\)" if closed else "checkpoints: Permission denied"
        )
        for resume in ("auto", str(run)):
            with pytest.raises(UserError, match=reason):
                resolve_resume(config(resume=resume), run)
        with pytest.raises(UserError, match="holds a run already" if closed else reason):
            refuse_used(config(), run)
        if closed:
            with pytest.raises(UserError, match=reason):
                checkpointing.load(run / "checkpoints" / closed)

    in_child(work, NOBODY)


def test_two_runs_in_one_folder_are_refused(straight: Path, tmp_path: Path) -> None:
    with claimed(tmp_path, "hydra.run.dir"):

        def work() -> None:
            with pytest.raises(UserError, match="another process writes into this folder"):
                run_training(config(), tmp_path, [])

        in_child(work)
    assert list(tmp_path.iterdir()) == []
    run_training(config(), tmp_path, [])  # and once that one has ended, it goes
    assert same_end(straight, tmp_path)


def test_a_store_that_keeps_training_waiting_is_told_of_again_and_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    waiting = SlowData("s3://bucket/tokens", seconds=0.01)
    trainer, module = Trainer(logger=False, enable_checkpointing=False), LightningModule()
    waiting.on_train_start(trainer, module)
    told = ""
    while told.count("warning: no batch for") < 3:  # pytest's timeout ends it
        told += capsys.readouterr().err
    waiting.on_train_batch_start(trainer, module, None, 0)
    assert "s3://bucket/tokens is slow or does not answer; data.threads=8" in told


def test_a_quick_disk_is_not_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(config(), tmp_path, [])
    assert "no batch for" not in capsys.readouterr().err


def test_clocks_that_jump_leave_a_run_as_it_is(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, cycle([3600.0, -7200.0, 0.0, 1e8, -1e8])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    saved = stopped_at(straight, 6, tmp_path)
    os.utime(saved, (4e9, 4e9))  # written "in the future"
    run_training(config(resume="auto"), tmp_path, [])
    assert same_end(straight, tmp_path)
    assert float(read_rows(tmp_path / "metrics.csv")[-1]["train/tokens_per_s"]) > 0


def test_secrets_are_in_no_file_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret, password = "hf_" + "S3cretValue" * 2, "user:hunter22"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET"):
        monkeypatch.setenv(name, secret + name)
    monkeypatch.setattr(sys, "argv", ["train", f"logger.wandb_name={secret}HF_TOKEN"])
    run = config()
    address = f"https://{password}@host/store"
    run.logger = replace(run.logger, wandb_name=f"{secret}HF_TOKEN", wandb_project=address)
    run_training(run, tmp_path, [f"logger.wandb_name={secret}HF_TOKEN"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        for text in (secret, password):
            assert text.encode() not in content, path.name
    saved = checkpointing.load(tmp_path / "checkpoints" / "last.ckpt")["blip3o"]["config"]
    assert secret not in json.dumps(saved)
    assert saved["logger"]["wandb_project"] == "https://***@host/store"
    said = capsys.readouterr()
    assert secret not in said.out + said.err


def test_masks_cover_names_that_hold_secrets_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "api_key"):
        monkeypatch.setenv(name, "0123456789")
        assert masked({"a": ["x 0123456789 y"]}) == {"a": ["x *** y"]}
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "true")
    for name in ("TOKENIZERS_PARALLELISM", "MONKEY", "PATH_TO_TOKENS"):
        monkeypatch.setenv(name, "0123456789")
        assert masked("0123456789 true") == "0123456789 true"
    assert masked("s3://bucket/a@b:c") == "s3://bucket/a@b:c"
    assert masked({"n": 3, "none": None}) == {"n": 3, "none": None}
