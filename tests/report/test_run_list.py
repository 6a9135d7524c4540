"""`python -m blip3o_lit.report runs`: a table, and removal by a key of the list that was seen."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from blip3o_lit.base.files import claimed
from blip3o_lit.report.__main__ import main


def made(folder: Path, age: float, cosine: float | None, finished: bool = True) -> Path:
    """A run directory as training leaves it, some days old."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "overrides.txt").write_text(f"model=tiny\nhydra.run.dir={folder}\n")
    (folder / "metrics.csv").write_text("step,train/loss\n7,0.5\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(bytes(2**20))
    (folder / "environment.json").write_text("{}")
    if cosine is not None:
        result = {"finished": finished, "step": 9, "best": {"cosine": cosine, "step": 9}}
        (folder / "result.json").write_text(json.dumps(result | ({} if finished else {"cut": {}})))
    when = os.stat(folder).st_mtime - age * 24 * 3600
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (when, when))
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(["runs", *words])
    out = capsys.readouterr()
    return f"{code} {out.out}{out.err}"


def test_runs_are_listed_and_removed_only_with_the_key_of_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "outputs"
    old, new = made(root / "a", 40, 0.5), made(root / "sweep" / "1", 1, None)
    cut = made(root / "b", 20, 0.25, finished=False)
    (old / "evaluation.json").write_text(json.dumps({"standing": "good, above every baseline"}))
    other = tmp_path / "photos"
    other.mkdir()
    (root / "link").symlink_to(other)
    table = said(capsys, str(root))
    lines = [line for line in table.splitlines() if "model=tiny" in line]
    assert [re.search(r"(sweep/1|a|b) ", line.split("│")[2])[1] for line in lines] == [  # type: ignore[index]
        "sweep/1",
        "b",
        "a",
    ]
    for words, line in (
        (("7 (unfinished)", "1.0 MiB"), lines[0]),
        (("9 (cut)", "0.2500"), lines[1]),
        (("0.5000", "good, above every baseline"), lines[2]),
    ):
        assert all(word in line for word in words), line
        assert "hydra.run.dir" not in line

    asked = (str(root), "--prune", "unfinished", "--older-than", "10")
    listed = said(capsys, *asked)
    assert "nothing was removed" in listed
    key = listed.split()[-1]
    assert cut.is_dir()
    assert said(capsys, *asked[:3], "--confirm", key).startswith("2 "), "that list is another one"
    with claimed(cut, "hydra.run.dir"):
        assert "another process writes into this folder" in said(capsys, *asked, "--confirm", key)
    assert "removed: 1 runs" in said(capsys, *asked, "--confirm", key)
    assert not cut.exists()
    assert old.is_dir()
    assert new.is_dir()
    assert other.is_dir()
    assert "0 runs" in said(capsys, str(root), "--prune", "all", "--keep", "2")
    assert said(capsys, str(tmp_path / "nowhere")).startswith("2 ")
