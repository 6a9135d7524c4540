"""A package outside the repository adds parts: the ones of docs/extending.md, installed by pip."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import DOCS, blocks

from blip3o_lit.config import registry
from blip3o_lit.config.errors import UserError

SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv", "precision=fp32"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=2", "evaluation.images=20", "checkpoint.every=2", "checkpoint.keep=-1"),
]
OWN = ["model=token_mlp", "model.options.hidden=24", "flow=late", "solver=ralston"]
OWN += ["solver.steps=3"]
SCRIPT = """
import importlib, json, sys
for name, *words in json.loads(sys.stdin.read()):
    print("$", name, *words, flush=True)
    print("$", name, *words, file=sys.stderr, flush=True)
    from hydra.core.global_hydra import GlobalHydra
    GlobalHydra.instance().clear()
    sys.argv = [name, *words]
    try:
        importlib.import_module(f"blip3o_lit.{name}").main()
    except SystemExit as ended:
        print("exit", ended.code, flush=True)
"""


def commands(lines: list[list[str]], site: Path | None, cwd: Path) -> dict[str, tuple[str, str]]:
    """Run commands one after the other in a process; return what each one wrote."""
    root = Path(registry.__file__).parents[2]
    paths = [str(root), *([str(site)] if site else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(lines),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    heads = [f"$ {' '.join(line)}\n" for line in lines]
    said = []
    for text in (done.stdout, done.stderr):
        parts = re.split("|".join(map(re.escape, heads)), text)[1:]
        assert len(parts) == len(lines), done.stderr
        said.append(parts)
    return {head[2:-1]: pair for head, *pair in zip(heads, *said)}  # type: ignore[misc]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, installed into a folder of its own."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    page = DOCS / "extending.md"
    (source / "pyproject.toml").write_text("\n".join(blocks(page, "toml")))
    code = blocks(page, "python")
    assert len(code) == 6
    assert max(len(block.splitlines()) for block in code) < 40
    (source / "my_parts.py").write_text("\n\n".join(code))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return target


def test_a_package_adds_parts_that_train_resume_score_and_export(
    site: Path, tmp_path: Path, shared_home: Path
) -> None:
    run, half = "hydra.run.dir=run", "run/checkpoints/step-00000002.ckpt"
    score = ["solvers=[ralston-3]", "metrics=[worst_token]", "own_baselines=[first_image]"]
    score += ["baselines=none", "curve=[]", "samples=0", "drawn_images=0"]
    lines = [
        ["train", *SMALL, *OWN, run, "trainer.max_steps=4"],
        ["train", *SMALL, *OWN, "hydra.run.dir=again", f"resume={half}", "trainer.max_steps=4"],
        ["train", "--help"],
        ["train", "model=token_mpl"],
        ["train", "model=token_mlp", "model.options.hiden=3"],
        ["evaluate", "ckpt=run", *score],
        ["export", "ckpt=run", "out=exported"],
        ["extract", "images=photos", "towers.condition.kind=blocks", "out=tokens"],
    ]
    (tmp_path / "photos").mkdir()
    from PIL import Image

    for shade in range(3):
        Image.new("RGB", (80, 60), (80 * shade, 9, 9)).save(tmp_path / "photos" / f"{shade}.png")
    said = commands(lines, site, tmp_path)
    out, errors = zip(*said.values())
    assert "exit" not in out[0] + out[1] + out[5] + out[6] + out[7], errors
    assert "token_mlp" in out[2]
    assert "late" in out[2]
    assert "did you mean model=token_mlp?" in errors[3]
    assert "did you mean model.options.hidden?" in errors[4]
    runs = (tmp_path / name / "result.json" for name in ("run", "again"))
    results = [json.loads(file.read_text()) for file in runs]
    assert results[0]["best"] == results[1]["best"]
    assert results[0]["train"]["loss"] == results[1]["train"]["loss"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["baselines"].keys() == {"first_image"}
    for scores in (*evaluation["estimators"].values(), *evaluation["baselines"].values()):
        assert -1 <= scores["worst_token"] < scores["cosine"]
    assert evaluation["estimators"]["ralston-3"]["nfe"] == 5
    facts = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert facts["parts"]["network"] == {
        "name": "token_mlp",
        "package": "my-parts",
        "version": "0.1",
    }
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["arrays"]["eva"]["tower"] == "blocks"

    gone = commands(
        [
            ["train", *SMALL, *OWN, "hydra.run.dir=other"],
            ["evaluate", "ckpt=run"],
            ["export", "ckpt=exported", "out=twice"],
        ],
        None,
        tmp_path,
    )
    for number, (text, error) in enumerate(gone.values()):
        assert text == "exit 2\n"
        assert len(error.splitlines()) == 1
        wanted = "comes from the package my-parts 0.1, which is not installed: install it"
        assert (wanted if number else "model=token_mlp is not an option") in error
    assert not (tmp_path / "other").exists()


def test_names_are_taken_once() -> None:
    kind = registry.Registry("thing", "thing.name", ("own",))
    kind("mine")(lambda: 1)
    kind("mine")(lambda: 2)  # a notebook's cell, run again
    assert kind.build("mine") == 2
    with pytest.raises(UserError, match="registers the thing own, which blip3o_lit itself has"):
        kind("own")(lambda: 3)
    with pytest.raises(UserError, match="small letters"):
        kind("Mine-2")
    with pytest.raises(UserError, match="did you mean thing.name=mine"):
        kind.build("mime")


def test_a_folder_of_the_users_own_adds_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from blip3o_lit.train import main

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wee.yaml").write_text("width: 24\ndepth: 1\nheads: 2\nkv_heads: 1\n")

    def line(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with contextlib.suppress(SystemExit):
            main()
        return "".join(capfd.readouterr())

    folder = f"--config-dir={tmp_path}"
    assert "width: 24" in line(folder, "--help", "model=wee")
    assert "did you mean model=wee" in line(folder, "model=wei")
    assert "no such folder" in line("--config-dir=nowhere", "model=wee")
    assert "model=wee is not an option" in line("model=wee")
