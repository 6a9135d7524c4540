"""The command line: every wrong word is refused in one line with the right word, exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from blip3o_lit.cli.arguments import OPTIONAL_GROUPS
from blip3o_lit.cli.schema import conf_dir, groups, keys, typed
from blip3o_lit.cli.sweeps.plugins import register_plugins
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig

ConfigStore.instance().store(name="train_schema", node=TrainConfig)
register_plugins()
OmegaConf.register_new_resolver("run_stamp", lambda: "test", replace=True)


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blip3o_lit.train", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["mdoel=base"], "model"),
        (["model=bsae"], "base"),
        (["mode=patch_onyl"], "patch_only"),
        (["+optimizer.lrr=1"], "optimizer.lr"),
        (["trainer.max_step=1"], "trainer.max_steps"),
        (["flow.prediction=velocty"], "velocity"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["optimizer.lr=1,2"], "-m"),
        (["hparams_search=optuna"], "-m"),
        (["-m", "hydra/launcher=proces"], "hydra/launcher=process"),
        (["-m", "hydra/launcher=process", "hydra.launcher.n_jobs=0", "seed=1,2"], "n_jobs"),
        (["-m", "model=demo,tyni"], "tiny"),
        (["model.heads=5"], "model.heads"),
        (["batch"], "key=value"),
        (["solver=mean", "flow.prediction=noise", "flow.time_zero_share=0"], "solver"),
    ],
)
def test_mistakes_exit_with_two_and_one_line(words: list[str], wanted: str, tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert wanted in lines[0]
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_help_explains_commands_and_groups(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("python -m blip3o_lit.train", "blip3o_lit.evaluate", "mode", "patch_only", "-m"):
        assert word in done.stdout


def compose_train(*overrides: str) -> TrainConfig:
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return typed(compose("train", overrides=list(overrides)), TrainConfig)


TRAIN_GROUPS = {
    group: options
    for group, options in groups(conf_dir()).items()
    if group in set(keys(TrainConfig))
} | {name: groups(conf_dir()).get(name, []) for name in OPTIONAL_GROUPS}


@pytest.mark.parametrize(
    "override", [f"{group}={option}" for group, all_ in TRAIN_GROUPS.items() for option in all_]
)
def test_every_option_of_every_group_composes(override: str) -> None:
    needs = {
        "data=tokens": ["data.tokens=somewhere"],
        "data=images": ["data.images=somewhere"],
        "solver=map": ["flow.pairs=0.5"],
    }.get(override, [])
    if override == "solver=fitted":  # which no flow has before it is trained
        with pytest.raises(UserError, match="after training"):
            compose_train(override)
        return
    assert isinstance(compose_train(override, *needs), TrainConfig)


def test_every_yaml_belongs_to_a_known_group_and_starts_with_a_comment() -> None:
    for path in conf_dir().rglob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path} does not say what it is"


def test_experiments_name_their_cost_and_command() -> None:
    for path in (conf_dir() / "experiment").glob("*.yaml"):
        text = path.read_text()
        for word in ("What:", "Cost:", "Expect:", "Command:"):
            assert f"# {word}" in text, f"{path.name} lacks {word}"
        cost = " ".join(text.partition("# Cost:")[2].partition("# Expect:")[0].split())
        if "CPU" in cost:  # minutes say nothing without what the cores reach
            assert "GFLOP/s" in cost, f"{path.name}: on which cores?"


def test_schema_refuses_a_key_that_came_past_hydra() -> None:
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        config = compose("train")
    OmegaConf.set_struct(config, False)
    OmegaConf.set_struct(config.optimizer, False)
    plain = OmegaConf.create(OmegaConf.to_container(config))
    plain.optimizer["lrr"] = 1
    with pytest.raises(UserError, match="lrr"):
        typed(plain, TrainConfig)
