"""What a command says: what helps when memory runs out; no colours unasked for, no noise."""

from __future__ import annotations

import os
import pty
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import in_child
from conftest import ROOT
from made_run import small_config
from quick_run import config

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.base.units import human_time
from blip3o_lit.budget.out_of_memory import advice, batch_limit, savings
from blip3o_lit.budget.placement import Placement
from blip3o_lit.budget.plan import Plan
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import PrecisionConfig, TrainerConfig
from blip3o_lit.doctor import COMPLETION
from blip3o_lit.models.precision import PRECISIONS
from blip3o_lit.training.run import run_training


def made_plan(run: TrainConfig, world: int, micro_batch: int, strategy: str = "single") -> Plan:
    """Figures of a layout on a CPU, without a store."""
    side = TokenShape((16, 16), False, 1024)
    formats = PRECISIONS[run.precision.name]
    placement = Placement("cpu", world, 1, strategy, formats, micro_batch, 1, False)
    return Plan(run, placement, "cpu", PairShape(side, side), Path(), 1, 1, 1)


def test_memory_that_runs_out_names_the_next_batch_and_what_saves_most() -> None:
    run = replace(small_config(), model=ModelConfig(), precision=PrecisionConfig("bf16"))
    line = advice(made_plan(run, 1, 48))
    assert line.startswith("out of memory on cpu with micro_batch_size=48: try micro_batch_size=24")
    assert re.search(r"; model\.activation_checkpointing=true saves most, about \d+\.\d GiB", line)
    lean = replace(run, model=replace(run.model, activation_checkpointing=True))
    assert "strategy=fsdp2 saves most" in advice(made_plan(lean, 8, 1, "ddp"))
    assert max(savings(made_plan(lean, 1, 48)).values()) == 0
    assert advice(made_plan(lean, 1, 1)).endswith("try a smaller model=")
    full = replace(run, precision=PrecisionConfig("fp32"))
    assert savings(made_plan(full, 1, 48))["precision=bf16"] > 0


def test_a_run_that_truly_runs_out_says_it_in_one_line(tmp_path: Path) -> None:
    huge = config(
        model=ModelConfig(width=512, depth=2, heads=8, kv_heads=8, mlp_width=2048),
        trainer=TrainerConfig(2, accelerator="cpu"),
        batch_size=1024,
        micro_batch_size=1024,
    )

    def work() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)
        with pytest.raises(UserError, match="micro_batch_size=1024: try micro_batch_size=512") as e:
            run_training(huge, tmp_path, [])
        assert "saves most" in str(e.value)

    in_child(work)


def test_other_errors_are_not_taken_for_memory() -> None:
    with (
        pytest.raises(UserError, match="batch_size=64: try batch_size=32"),
        batch_limit("batch_size", 64),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
    with pytest.raises(RuntimeError, match="shapes"), batch_limit("batch_size", 64):
        raise RuntimeError("shapes do not fit")


def on_a_terminal(words: list[str], **environment: str) -> str:
    """Return what a command writes on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end was closed
            break
        if not part:
            break
        said += part
    process.wait(60)
    os.close(ours)
    return said.decode().replace("\r\n", "\n")


TABLE = """
from blip3o_lit.inspection.finding import Finding, show
show([Finding("ok", "torch", "2.15"), Finding("warn", "disk", "nearly full, " * 9, "rm")], "here")
"""


def test_no_color_and_the_width_are_respected() -> None:
    coloured = on_a_terminal(["-c", TABLE], COLUMNS="60", NO_COLOR="")
    plain = on_a_terminal(["-c", TABLE], COLUMNS="60", NO_COLOR="1")
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colour.search(coloured)
    assert not colour.search(plain)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", plain).splitlines()
    assert max(len(line) for line in shown) <= 60
    assert len(shown) > 4


def test_the_printed_line_installs_tab_completion(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("blip3o-train")
    if not command.is_file():
        pytest.skip("needs the installed command")
    asked = {"COMP_LINE": "blip3o-train model=ti", "COMP_POINT": "21"}
    places = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    script = f"{COMPLETION}; complete -p blip3o-train; blip3o-train -sc query=bash"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **asked, "PATH": places},
        cwd=tmp_path,
    )
    assert "hydra_bash_completion blip3o-train" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "model=tiny"


def test_a_clean_run_prints_no_warning(tmp_path: Path) -> None:
    words = "data=linear_gaussian model=tiny precision=fp32 trainer.max_steps=3 evaluation.images=8"
    words += " data.linear_gaussian.images=64 data.linear_gaussian.validation_images=8 batch_size=8"
    steps = [
        ["-m", "blip3o_lit.train", *words.split(), f"hydra.run.dir={tmp_path}/run"],
        [
            "-m",
            "blip3o_lit.evaluate",
            f"ckpt={tmp_path}/run",
            "curve=[]",
            "samples=0",
            "solvers=[]",
        ],
    ]
    for step in steps:
        done = subprocess.run(
            [sys.executable, *step], capture_output=True, text=True, cwd=ROOT, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert not re.search(r"warn|deprecat|Traceback", done.stdout, re.IGNORECASE)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0s"), (0.0423, "42ms"), (0.0995, "0.1s"), (59.4, "59.4s"), (60.4, "1m00s")],
)
def test_a_duration_is_never_said_to_be_nothing(seconds: float, said: str) -> None:
    assert human_time(seconds) == said
