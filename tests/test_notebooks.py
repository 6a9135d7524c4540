"""The notebooks run from the first cell to the last, on a small evaluated run."""

import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from made_run import make_run, small_config
from nbclient import NotebookClient

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.extraction.demo import demo_store

pytestmark = pytest.mark.timeout(900)  # two processes import everything: slow on a busy machine
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture(scope="module")
def run(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run of random weights on 24 scenes, with three logged steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(shared_home))
        store = demo_store(train=16, validation=8)
        data = DataConfig(tokens=str(store))
        folder = make_run(
            tmp_path_factory.mktemp("notebook") / "run", store, replace(small_config(), data=data)
        )
        rows = ["step,train/loss,train/cosine,val/cosine"]
        rows += [f"{step},{1 / step},{1 - 0.5 / step},0.9" for step in (1, 2, 3)]
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        evaluate(EvaluateConfig(ckpt=str(folder), solvers=["euler-2"], curve=["euler-1"]))
    return folder


def execute(name: str, monkeypatch: pytest.MonkeyPatch, run: Path) -> nbformat.NotebookNode:
    monkeypatch.setenv("BLIP3O_RUN", str(run))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = NotebookClient(book, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}})
    return client.execute()


def test_quickstart_runs_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = execute("quickstart.ipynb", monkeypatch, run)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7  # ladder, map, curve, loss, cosine, scene, map of the scene
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "8 images of validation, patch_only" in said
    for label in ("Posterior mean", "Mean token", "Ridge"):
        assert label in said
    assert re.search(r"EVA tokens \(1, 256, 192\) -> CLIP tokens \(1, 256, 128\)", said)
    assert said.count("heun-10") == 2
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(file: Path) -> None:
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
