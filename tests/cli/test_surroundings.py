"""What a shell, a cluster or an account puts around a command: it works, or is one line."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from made_run import make_run, small_config

from blip3o_lit import BLIP3oInference
from blip3o_lit.base.files import replacing
from blip3o_lit.base.home import home, refusal
from blip3o_lit.base.launcher import Launch, launch
from blip3o_lit.config.errors import UserError
from blip3o_lit.extraction.engine import worker_of
from blip3o_lit.training.cluster import TOLD, ranks
from blip3o_lit.training.loggers import loggers

OWN, PARENT = 1000, 999
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NAME": "job",
}
STEP = ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_NODEID": "1"}
SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.max_steps=2", "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=2", "evaluation.images=20"),
]


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, Launch()),
        ({"RANK": "", "LOCAL_RANK": " ", "WORLD_SIZE": ""}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        (PLACE, Launch()),
        ({**PLACE, "NODE_RANK": "1"}, Launch(node=1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "unset RANK WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "unset WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, "unset LOCAL_RANK"),
        ({"RANK": "abc"}, "RANK=abc"),
        ({"RANK": "-1"}, "unset RANK"),
        ({"NODE_RANK": "x"}, "NODE_RANK=x"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "torchrun"),
        # torchrun
        ({"TORCHELASTIC_RUN_ID": "none"}, "RANK, LOCAL_RANK"),
        (
            {**PLACE, "TORCHELASTIC_RUN_ID": "a", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
            | {"GROUP_RANK": "1"},
            Launch("torchrun", 3, 1, 1, 4),
        ),
        (
            {
                **PLACE,
                "TORCHELASTIC_RUN_ID": "a",
                "RANK": "3",
                "LOCAL_RANK": "1",
                "WORLD_SIZE": "2",
            },
            "RANK=3 is not below WORLD_SIZE=2",
        ),
        # a hand
        ({**PLACE, "LOCAL_RANK": "1"}, Launch("hand", None, 1, 0, None)),
        (
            {**PLACE, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
            Launch("hand", 1, 1, 0, 2),
        ),
        ({**PLACE, "RANK": "1", "LOCAL_RANK": "one"}, "LOCAL_RANK=one"),
        # Slurm: a batch script, a notebook, terminals
        (ALLOCATION, Launch()),
        (ALLOCATION | PLACE, Launch()),
        (ALLOCATION | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "jupyter"}, Launch()),
        (ALLOCATION | {"SLURM_NTASKS": "many", "SLURM_PROCID": "x"}, Launch()),
        (ALLOCATION | {"SLURM_STEP_ID": "4294967290"}, Launch()),
        (ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"}, Launch()),
        (STEP | {"SLURM_PTY_PORT": "4000"}, Launch()),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        # Slurm: srun
        (STEP, Launch("srun", 3, 1, 1, 4)),
        (STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Launch("srun", 0, 0, 1, 4)),
        (ALLOCATION | {"BLIP3O_TASKS": "srun"}, Launch("srun", 0, 0, 0, 4)),
        (STEP | {"SLURM_NTASKS": "abc"}, "SLURM_NTASKS=abc"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 is not below"),
        # ranks that rank 0 started itself
        (
            {**PLACE, "BLIP3O_PARENT": str(PARENT), "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
            Launch("parent", None, 1, 0, 2),
        ),
        ({**PLACE, "BLIP3O_PARENT": str(OWN), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, Launch()),
        ({"BLIP3O_PARENT": "5"}, "unset BLIP3O_PARENT"),
        # torchrun inside an allocation
        (
            ALLOCATION
            | {**PLACE, "TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1"}
            | {"WORLD_SIZE": "2"},
            Launch("torchrun", 1, 1, 0, 2),
        ),
    ],
)
def test_who_started_this_process(environment: dict[str, str], wanted: Launch | str) -> None:
    if isinstance(wanted, Launch):
        this = launch(environment or {"HOME": "/"}, OWN, PARENT)
        assert this == wanted
        assert this.first == (not any((wanted.rank, wanted.local, wanted.node)))
        return
    with pytest.raises(UserError) as error:
        launch(environment, OWN, PARENT)
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("this", "devices", "nodes", "wanted"),
    [
        (Launch("srun", 1, 1, 0, 4), 1, 1, "srun started 4 processes"),
        (Launch("torchrun", 1, 1, 0, 2), 1, 1, "without torchrun"),
        (Launch("hand", 1, 1, 0, 2), 1, 1, "trainer.devices"),
        (Launch("hand", None, 1), 1, 1, "trainer.devices"),
        (Launch(), 1, 2, "NODE_RANK, MASTER_ADDR and MASTER_PORT"),
        (Launch("srun", 3, 1, 1, 4), 2, 2, None),
        (Launch("hand", None, 1), 2, 1, None),
        (Launch(), 8, 1, None),
    ],
)
def test_other_processes_than_the_run_has_ranks(
    this: Launch, devices: int, nodes: int, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if wanted is None:
        this.check(devices, nodes)
        return
    with pytest.raises(UserError, match=wanted):
        this.check(devices, nodes)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "BLIP3O_PARENT"):
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken))
        own = ranks(Launch(), 2, 1)
        assert own.main_port not in (taken, 0)
        assert own.main_address == "127.0.0.1"
        with pytest.raises(UserError, match=f"MASTER_PORT={taken} is taken"):
            ranks(Launch("hand", 0, 0, 0, 2), 2, 1)
        assert ranks(Launch("hand", 1, 1, 0, 2), 2, 1).main_port == taken
    free = ranks(Launch(), 2, 1)
    assert free.main_port == taken, "MASTER_PORT is taken where it is free"
    for wrong in ("abc", "0", "99999"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        assert ranks(Launch(), 2, 1).main_port > 0
        with pytest.raises(UserError, match=f"MASTER_PORT={wrong}"):
            ranks(Launch("hand", 1, 1, 0, 2), 2, 1)


def test_ranks_leave_the_environment_as_they_found_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29111")
    before = dict(os.environ)
    planned = ranks(Launch(), 2, 1)
    assert dict(os.environ) == before, "a run that is planned alone leaves a mark"
    planned.validate_settings(2, 1)
    os.environ.update(dict.fromkeys(TOLD[1:], "0"))  # as Lightning, before it starts the others
    assert launch() == Launch(), "rank 0 takes itself for one that was started"
    planned.teardown()
    assert dict(os.environ) == before
    alone = ranks(Launch(), 1, 1)
    alone.validate_settings(1, 1)
    alone.teardown()
    assert dict(os.environ) == before


def test_extraction_takes_its_share_from_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wanted in (("abc", "RANK=abc"), ("2", "unset RANK WORLD_SIZE"), ("-1", "RANK=-1")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=wanted):
            worker_of(None)
        assert worker_of("0/1") == (0, 1)
    monkeypatch.delenv("RANK")
    for name, value in ALLOCATION.items():
        monkeypatch.setenv(name, value)
    assert worker_of(None) == (0, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert worker_of(None) == (0, 4)


def command(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_batch_script_without_srun_trains_on_both_devices(tmp_path: Path) -> None:
    words = ("strategy=ddp", "trainer.devices=2", "hydra.run.dir=run")
    shell = ALLOCATION | {"SLURM_NTASKS_PER_NODE": "4", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = command("blip3o_lit.train", *SMALL, *words, cwd=tmp_path, **shell)
    assert done.returncode == 0, done.stderr
    assert "= 2 process(es)" in done.stdout
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_a_rank_ends_with_the_rank_that_started_it(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the system's own way, Linux alone")
    code = """
import os, subprocess, sys, time
if "BLIP3O_PARENT" not in os.environ:
    os.environ.update(BLIP3O_PARENT=str(os.getpid()), LOCAL_RANK="1", WORLD_SIZE="2")
    child = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    print(child.stdout.readline().strip(), flush=True)
    os._exit(1)
from blip3o_lit.base.launcher import settle
assert settle(1).by == "parent"
print(os.getpid(), flush=True)
time.sleep(100)
"""
    (tmp_path / "rank.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "rank.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    child = int(done.stdout)
    until = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < until, "the rank outlives its parent"


def test_no_home_and_a_home_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    for path, key in (
        (tmp_path / "home" / "statistics" / "a.safetensors", "set BLIP3O_HOME"),
        (run / "config.yaml", "hydra.run.dir"),
        (tmp_path / "tokens.tar", "tokens.tar: Permission denied"),
    ):
        line = refusal(PermissionError(13, "Permission denied", str(path)), run)
        assert line is not None
        assert key in line
        assert str(path) in line
    monkeypatch.setenv("BLIP3O_HOME", "/cache/blip3o")
    assert "BLIP3O_HOME" in str(refusal(PermissionError(13, "no", "/cache"), run))
    assert refusal(FileNotFoundError(2, "No such file", "a"), run) is None, "may be our own fault"
    monkeypatch.setenv("BLIP3O_HOME", "~nobody-of-that-name/cache")
    with pytest.raises(UserError, match="set BLIP3O_HOME"):
        home()


def test_a_home_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file")
    done = command("blip3o_lit.train", *SMALL, "hydra.run.dir=run", cwd=tmp_path, BLIP3O_HOME=place)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "BLIP3O_HOME" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a" / "file") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "file").stat().st_mode) == 0o666 & ~mask


def test_wandb_that_cannot_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    config.logger.wandb, config.logger.tensorboard = True, False
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    for variables, wanted in (
        ({"WANDB_MODE": "sometimes"}, "WANDB_MODE=offline"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "logger.wandb_offline=true"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=wanted):
            loggers(config, tmp_path, None, 0)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert [logger.name for logger in loggers(config, tmp_path, None, 0)] == ["csv"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BLIP3oInference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(tmp_path_factory.mktemp("home")))
        return BLIP3oInference(make_run(tmp_path_factory.mktemp("run")), device="cpu")


def conditions() -> torch.Tensor:
    return torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("solver", ["mean", "heun-3", "ab2-3", "dopri5"])
def test_samples_do_not_depend_on_torchs_defaults(solver: str, model: BLIP3oInference) -> None:
    given = conditions()
    wanted = model.generate(given, solver=solver)
    for number, device in ((torch.float64, None), (torch.float16, None), (None, "meta")):
        torch.set_default_dtype(number or torch.float32)
        torch.set_default_device(device)
        try:
            again = BLIP3oInference(model.loaded.file, device="cpu")
            made = [known.generate(given, solver=solver) for known in (model, again)]
            made.append(model.generate(given.numpy(), solver=solver))
            between = model.interpolate_embeddings(given[0], given[1], 3)
            assert torch.get_default_dtype() == (number or torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert all(torch.equal(one, wanted) for one in made)
        assert between.dtype == torch.float32


def test_a_model_goes_to_a_worker_process(model: BLIP3oInference) -> None:
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301 (our own object, made just now)
    wanted = model.generate(conditions(), solver="heun-3")
    assert torch.equal(copy.generate(conditions(), solver="heun-3"), wanted)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        made = pool.apply(model.generate, (conditions().numpy(), None, "heun-3"))
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


NAMELESS = """
import getpass, os, pathlib, pwd
from blip3o_lit.base.home import adopt_home
os.setuid(54321)
adopt_home()
print(pathlib.Path.home(), bool(getpass.getuser()))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be others")
def test_a_user_without_an_entry_has_a_home_and_a_name(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "BLIP3O_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", NAMELESS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(tmp_path), "True"], done.stderr


def test_ranks_do_not_reach_commands_that_are_one_process(tmp_path: Path) -> None:
    left = {"RANK": "abc", "LOCAL_RANK": "", "SLURM_PROCID": "x"}
    done = command("blip3o_lit.export", "ckpt=nowhere.ckpt", "out=out", cwd=tmp_path, **left)
    assert done.returncode == 2
    assert "nowhere.ckpt" in done.stderr
    assert len(done.stderr.splitlines()) == 1
