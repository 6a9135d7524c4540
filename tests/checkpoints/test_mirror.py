"""A run's copy in a bucket: the same files, gone on from, and never a reason to lose the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bucket as server
import pytest
from bucket import Bucket
from quick_run import config, differences, state

from blip3o_lit.checkpoints.mirror import Mirror
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import CheckpointConfig
from blip3o_lit.training.run import run_training


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with server.serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(autouse=True)
def _keys(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in bucket.variables.items():
        monkeypatch.setenv(name, value)


def mirrored(address: str, steps: int, **changes: object) -> TrainConfig:
    base = config(**changes)
    saving = CheckpointConfig(every=2, keep=1, mirror=address)
    return replace(base, checkpoint=saving, trainer=replace(base.trainer, max_steps=steps))


def test_a_run_goes_on_from_its_copy(bucket: Bucket, tmp_path: Path) -> None:
    address = "s3://bucket/runs/one"
    run_training(mirrored(address, 6), tmp_path / "run", [])
    copy, local = bucket.folder / "runs" / "one", tmp_path / "run"
    files = {path.relative_to(local): path for path in local.rglob("*") if path.is_file()}
    for name, path in files.items():
        assert name.name.startswith(".") or (copy / name).read_bytes() == path.read_bytes()
    steps = [path.name for path in (copy / "checkpoints").glob("step-*")]
    assert steps == ["step-00000006.ckpt"]  # those that the run removed are gone there too
    with pytest.raises(UserError, match="holds a run already: go on with it by resume=s3://"):
        run_training(mirrored(address, 6), tmp_path / "second", [])
    shutil.rmtree(local)

    run_training(mirrored(address, 12, resume=address), tmp_path / "on", [])
    run_training(config(), tmp_path / "whole", [])
    last = "checkpoints/last.ckpt"
    assert not differences(state(tmp_path / "on" / last), state(tmp_path / "whole" / last))
    (copy / "checkpoints" / "step-00000012.ckpt").write_bytes(b"half")
    finished = mirrored(address, 12, resume=f"{address}/{last}")
    with pytest.raises(UserError, match="it is at step 12 already"):
        run_training(finished, tmp_path / "again", [])
    for missing in ("s3://bucket/none", f"{address}/checkpoints/none.ckpt"):
        with pytest.raises(UserError, match=r"no (sound|such) checkpoint"):
            run_training(mirrored(address, 12, resume=missing), tmp_path / "again", [])


def test_faults_of_the_network_cost_a_line_and_no_run(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address, match in (("s3://none/run", "NoSuchBucket"), ("http://host/run", "can't")):
        with pytest.raises(UserError, match=match):
            Mirror(tmp_path, address).begin(fresh=True, overwrite=False)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0")
    mirror = Mirror(run, "s3://bucket/runs/two")
    mirror.begin(fresh=True, overwrite=False)
    copy = bucket.folder / "runs" / "two"
    shutil.rmtree(copy)
    bucket.folder.rename(bucket.folder.with_name("away"))
    (run / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    mirror.changed()
    assert mirror._round is not None
    assert not mirror._round.result()
    assert capsys.readouterr().err.count("\n") == 1
    bucket.folder.with_name("away").rename(bucket.folder)
    mirror.finish()
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() == b"weights"
    assert capsys.readouterr().err == ""
