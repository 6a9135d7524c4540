"""A run's copy in a bucket: the same files, gone on from, and never a reason to lose the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from bucket import Bucket
from quick_run import config, differences, state

from blip3o_lit.base.objects import Objects
from blip3o_lit.checkpoints.mirror import Mirror
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import CheckpointConfig
from blip3o_lit.training.run import run_training


def mirrored(address: str, **changes: object) -> TrainConfig:
    return config(checkpoint=CheckpointConfig(every=2, keep=-1, mirror=address), **changes)


def test_a_run_goes_on_from_its_copy(bucket: Bucket, tmp_path: Path) -> None:
    address, last = "s3://bucket/runs/one", "checkpoints/last.ckpt"
    local, copy = tmp_path / "run", bucket.folder / "runs" / "one"
    run_training(mirrored(address), local, [])
    files = {path.relative_to(local): path for path in local.rglob("*") if path.is_file()}
    for name, path in files.items():
        assert name.name.startswith(".") or (copy / name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="holds a run already: go on with it by resume=s3://"):
        run_training(mirrored(address), tmp_path / "second", [])
    with pytest.raises(UserError, match="it is at step 12 already"):
        run_training(mirrored(address, resume=f"{address}/{last}"), tmp_path / "second", [])
    for path in (copy / "checkpoints").iterdir():  # as if it had been lost after step 6
        if path.name not in ("step-00000004.ckpt", "step-00000006.ckpt"):
            path.unlink()
    (tmp_path / "half").write_bytes(b"half")
    Objects(address).put(tmp_path / "half", "checkpoints/step-00000008.ckpt")
    run_training(mirrored(address, resume=address), tmp_path / "on", [])
    assert not differences(state(tmp_path / "on" / last), state(local / last))
    rows = (tmp_path / "on" / "metrics.csv").read_text().splitlines()
    assert rows[1].split(",")[0] == "7"
    for missing in ("s3://bucket/none", f"{address}/checkpoints/none.ckpt"):
        with pytest.raises(UserError, match=r"no (sound|such) checkpoint"):
            run_training(mirrored(address, resume=missing), tmp_path / "second", [])


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
    (copy / "checkpoints").write_text("no folder: nothing can be put below it")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    mirror.changed()
    assert mirror._round is not None
    assert not mirror._round.result()
    assert capsys.readouterr().err.count("\n") == 1
    (copy / "checkpoints").unlink()
    (run / "checkpoints" / "step-00000002.ckpt").hardlink_to(run / "checkpoints" / "last.ckpt")
    mirror.changed()
    assert mirror._round.result()
    (run / "checkpoints" / "step-00000002.ckpt").unlink()
    mirror.finish()
    assert not (copy / "checkpoints" / "step-00000002.ckpt").exists()
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() == b"weights"
    assert capsys.readouterr().err == ""
