"""Every command of the pages is run, made small, or has the reason here why it is not.

The quick test says that no command is forgotten. The long one (`make soak`) types them in order
into one folder, as a reader would: words of `SMALL` replace those of the same key, places of
`PLACES` stand for the reader's own, and the tutorial's Python blocks run where it has them.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from documented import DOCS, FOREIGN, PAGES, blocks, lines
from seed_pickles import embeddings

STEPS = "trainer.max_steps=3 trainer.accelerator=cpu evaluation.images=8 precision=fp32"
TOKENS = "data=tokens data.tokens=tokens"
TRAIN = f"{STEPS} {TOKENS} model=tiny batch_size=8"
SCORE = "baseline_steps=2 solvers=[] curve=[] samples=0 images=8 batch_size=8"
SMALL = {
    "doctor": "",
    "export ckpt": "",
    "evaluate": SCORE,
    "extract images=/data/photos": "towers=demo out=tokens_again split.fraction=0.2",
    "extract images=photos towers=demo": "",
    "convert": "out=converted",
    "generate ckpt=exported": "batch_size=8 solver.steps=2",
    "generate ckpt=outputs/demo images": "towers=demo",
    "generate ckpt=outputs/demo tokens": "batch_size=8",
    "generate ckpt=outputs/train": "batch_size=8",
    "train data=tokens": f"{TRAIN} model=tiny",
    "train model=base": TRAIN,
    "train model=base data=images": f"{STEPS} towers=demo model=tiny batch_size=8",
    "train experiment=demo": f"{STEPS} {TOKENS}",
    "train +callbacks": f"{TRAIN} model=tiny",
    "train callbacks": f"{TRAIN} model=tiny",
    "train logger.table": f"{TRAIN} model=tiny",
    "train strategy=ddp": f"{TRAIN} trainer.devices=2",
    "train plan=true": "",
    "train -m model=tiny,small": f"{TRAIN} model=tiny",
    "train -m hydra/launcher=process": f"{TRAIN} model=tiny",
    "train -m hparams_search=optuna hydra.sweeper": f"{TRAIN} hydra.sweeper.n_trials=2",
    "train -m experiment=demo": f"{STEPS} flow.prediction=sample",
    "blip3o_lit.report": "",
    "scripts/simulate_cluster.py gpus": "",
    "train experiment=text data=images": "",
    "printf": "",
}
"""Beginning of a command -> what makes it small."""
PLACES = {
    "/data/tokens": "tokens",
    "/data/other": "tokens",
    "/data/generated": "generated_too",
    "/data/photos": "photos",
    "/data/embeddings": "embeddings",
    "outputs/train/RUN": "outputs/photos",
    "outputs/demo": "outputs/photos",
}
REASONS = {
    "make": "this is run by them; continuous integration runs demo, test, docs and dist",
    "export push_to_hub": "needs an account; test_inference.py uploads to a stand-in over HTTP",
    "extract towers=eva02l_clipl14": "downloads two towers",
    "generate ckpt=outputs/train/RUN tokens=tokens split": "downloads a decoder",
    "extract images=photos out=tokens towers=eva02l": "downloads two towers",
    'extract images="images/': "needs 17 GB of weights and the pictures of hf download above it",
    "train strategy=fsdp2": "test_strategies.py runs it, with two processes",
    "train -m hparams_search=optuna optimizer.lr": "test_sweeps.py runs its search",
    "train experiment=demo_large mode=grid_64": "the script that wrote the page runs it",
    "train model=base mode=patch_only data=tokens data.tokens=s3": "test_remote.py has a bucket",
    "train experiment=demo hydra.run.dir=outputs/a checkpoint.mirror": "so has test_mirror.py",
    "train experiment=demo hydra.run.dir=outputs/b checkpoint.mirror": "the same",
    "train experiment=demo optimizer.ema_profiles": "test_averages.py has such runs",
    "evaluate ckpt=outputs/averages": "the same",
    "export ckpt=outputs/averages": "the same",
    "export soup": "test_soup.py has such runs",
    "train logger=[csv,mlflow]": "test_own_parts.py logs so where MLflow is installed",
    "generate ckpt=RUN tokens=tokens out=generated solver=map": "test_maps.py has such a run",
    "train experiment=demo_text": "takes hours; test_words_run.py has such a run",
    "generate ckpt=runs/words": "test_words_run.py has such a run",
    "evaluate ckpt=runs/words": "the same",
    "extract images=photos towers=text": "downloads two towers",
    "train experiment=text data=tokens": "wants that store; test_words_run.py has such a run",
    "scripts/from_seed.py": "test_from_seed.py runs every block of that page",
    "scripts/objective_table.py": "takes hours",
    "scripts/peers.py": "wants three checkouts, and half an hour",
    "scripts/simulate_cluster.py": "a minute; its smaller line is run",
    **FOREIGN,
}
"""Beginning of a command -> why it is not run."""
ORDER = ["tutorial.md", "export.md", "image-to-text.md"]


def short(words: list[str]) -> str:
    """Return a command without `python -m blip3o_lit.`."""
    text = " ".join(words)
    if not text.startswith("python -m blip3o_lit.report"):
        text = text.removeprefix("python -m blip3o_lit.")
    return text.removeprefix("python -m ").removeprefix("python ")


def kind(words: list[str]) -> tuple[str, str]:
    """Return `run` or `told` with the entry of the longest fitting beginning."""
    text = short(words)
    if text.startswith("export") and "push_to_hub" in text:
        return "told", "export push_to_hub"
    fitting = [("run", key) for key in SMALL if text.startswith(key)]
    fitting += [("told", key) for key in REASONS if text.startswith(key)]
    assert fitting, f"{text}: run it in SMALL, or say in REASONS why not"
    return max(fitting, key=lambda pair: len(pair[1]))


def commands() -> list[tuple[str, list[str]]]:
    """Return page and words of every command, the tutorial's first."""
    pages = sorted(PAGES, key=lambda page: ORDER.index(page.name) if page.name in ORDER else 9)
    return [(page.name, words) for page in pages for words in lines(page)]


def test_every_command_is_run_or_has_a_reason() -> None:
    found = [kind(words) for _, words in commands()]
    used = set(found)
    run = sum(way == "run" for way, _ in found)
    print(f"{run} of {len(found)} commands are run, {len(found) - run} have a reason")
    assert run >= 30
    for entry in [("run", key) for key in SMALL] + [("told", key) for key in REASONS]:
        assert entry in used or entry[1] in FOREIGN, f"{entry[1]} is on no page any more"


def smaller(words: list[str], more: str) -> list[str]:
    """Return the words with the reader's places and with what makes the command small."""
    placed = []
    for word in words:
        for place, own in PLACES.items():
            word = word.replace(place, own)
        placed.append(word)
    changes = {word.partition("=")[0]: word for word in more.split()}
    kept = [word for word in placed if word.partition("=")[0] not in changes]
    return kept + list(changes.values())


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_the_commands_of_the_pages_do_what_they_say(tmp_path: Path) -> None:
    source = tmp_path / "embeddings"
    source.mkdir()
    (source / "all.pkl").write_bytes(pickle.dumps(embeddings(40, 64)))
    tutorial = blocks(DOCS / "tutorial.md", "python")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def typed(words: list[str]) -> str:
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, (
            f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done.stdout

    typed([sys.executable, "-c", tutorial[0]])
    ran = 0
    for page, words in commands():
        way, key = kind(words)
        if way == "told":
            continue
        if words[0] == "printf":
            captions = tmp_path / "captions.txt"
            captions.write_text(words[1].replace("\\n", "\n"))
            ran += 1
            continue
        line = smaller(words, SMALL[key])
        if line[1].startswith("scripts/"):
            line[1] = str(ROOT / line[1])
        if line[-1].endswith("/STAMP"):
            line[-1] = str(next((tmp_path / "outputs" / "sweeps").iterdir()))
        if "out=exported" in line and (tmp_path / "exported").exists():
            line = [word.replace("out=exported", f"out=exported{ran}") for word in line]
        if line[:2] != ["python", "-m"] and not line[1].endswith(".py"):
            raise AssertionError(f"{page}: how is {line} run?")
        said = typed([sys.executable, *line[1:]])
        assert "Traceback" not in said
        ran += 1
        print(page, " ".join(line))
        if page == "tutorial.md" and re.search(r"\.export$", line[2]):
            typed([sys.executable, "-c", tutorial[1]])
    assert ran >= 30
