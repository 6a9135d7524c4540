"""The notebooks run from the first cell to the last, on a small evaluated run."""

import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from made_run import make_run, small_config
from nbclient import NotebookClient

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.extraction.demo import demo_store

pytestmark = pytest.mark.timeout(900)  # two processes import everything: slow on a busy machine
NOTEBOOKS = ROOT / "notebooks"


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


@pytest.fixture(scope="module")
def books(run: Path) -> dict[str, nbformat.NotebookNode]:
    """All notebooks, run one after the other in one kernel (ruff knows each one's own names)."""
    found = {file.stem: nbformat.read(file, as_version=4) for file in NOTEBOOKS.glob("*.ipynb")}
    whole = nbformat.v4.new_notebook(metadata=found["quickstart"].metadata)
    for book in found.values():
        whole.cells += book.cells
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_RUN", str(run))
        patch.setenv("PYTHONWARNINGS", "ignore")
        where = {"metadata": {"path": str(NOTEBOOKS)}}
        NotebookClient(whole, timeout=600, resources=where).execute()
    return found


def outputs(book: nbformat.NotebookNode) -> tuple[str, int]:
    """Return what a notebook printed, and the number of its pictures; it may print no warning."""
    found = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not [output for output in found if output.get("name") == "stderr"]
    pictures = [output for output in found if "image/png" in output.get("data", {})]
    return "".join(o.text for o in found if o.output_type == "stream"), len(pictures)


def test_quickstart_runs_to_its_end(books: dict[str, nbformat.NotebookNode]) -> None:
    said, pictures = outputs(books["quickstart"])
    assert pictures == 7  # ladder, map, curve, loss, cosine, scene, map of the scene
    assert "8 images of validation, patch_only" in said
    for label in ("Posterior mean", "Mean token", "Ridge"):
        assert label in said
    assert re.search(r"EVA tokens \(1, 256, 192\) -> CLIP tokens \(1, 256, 128\)", said)
    assert said.count("heun-10") == 2


def test_the_flow_is_understood(books: dict[str, nbformat.NotebookNode]) -> None:
    said, pictures = outputs(books["understanding_the_flow"])
    assert pictures == 5  # paths, fields, mean and samples, solvers, a network
    ratio = re.search(r"ratio (\d\.\d+)", said)
    assert ratio
    assert 1.7 < float(ratio[1]) < 2.3
    apart = re.search(r"exact mean are (\d\.\d+) apart", said)
    assert apart
    assert float(apart[1]) < 0.3
    assert all(float(error) < 1e-5 for error in re.findall(r"error of x1 (\S+)", said))


def test_the_report_is_read(books: dict[str, nbformat.NotebookNode]) -> None:
    said, pictures = outputs(books["reading_a_report"])
    assert pictures == 2  # maps, curves
    assert "mean       against mean_token" in said
    assert "the neighbour's" in said
    assert re.search(r"image_to_text\n +R@1 +\d\.\d{3}", said)


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(file: Path) -> None:
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
