"""The commands as functions: light to import, and as strict as the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from documented import DOCS, blocks
from PIL import Image

from blip3o_lit.api import compose, train
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.train import TrainConfig

LIGHT = """
import sys
import blip3o_lit, blip3o_lit.api
assert not {"torch", "lightning", "hydra", "omegaconf"} & sys.modules.keys()
assert callable(blip3o_lit.api.train)
import blip3o_lit.train
assert not callable(blip3o_lit.train)
"""


def test_imports_are_light_and_names_are_modules() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_words_are_those_of_the_command_line(tmp_path: Path) -> None:
    config = compose("train", "model=tiny", "optimizer.lr=1e-4", "callbacks=model_summary")
    assert isinstance(config, TrainConfig)
    assert (config.model.width, config.optimizer.lr) == (384, 1e-4)
    assert "_target_" in config.callbacks["model_summary"]
    scored = compose("evaluate", "ckpt=run (1)")
    assert isinstance(scored, EvaluateConfig)
    assert scored.ckpt == "run (1)"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wee.yaml").write_text("width: 24\nheads: 2\nkv_heads: 1\n")
    assert compose("train", "model=wee", config_dir=tmp_path).model.width == 24
    for words, said in (
        (["model=tyni"], "did you mean model=tiny"),
        (["optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["--help"], "is a flag of the command line"),
        (["seed=1,2"], "stands for several runs"),
    ):
        with pytest.raises(UserError, match=said):
            compose("train", *words)
    with pytest.raises(UserError, match="did you mean command=train"):
        compose("trian")  # type: ignore[call-overload]
    with pytest.raises(UserError, match="several processes are started by the command alone"):
        train(compose("train", "trainer.devices=2"), tmp_path / "run")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for shade in range(3):
        Image.new("RGB", (80, 60), (80 * shade, 9, 9)).save(f"photos/{shade}.png")
    for number, block in enumerate(blocks(DOCS / "python.md", "python")):
        exec(compile(block, f"python.md {number}", "exec"), {})  # the page's own text
    assert Path("outputs/notebook/report.html").is_file()
    assert Path("outputs/notebook-export/model.safetensors").is_file()
    assert Path("outputs/photo-tokens/index.json").is_file()
