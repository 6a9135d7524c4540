"""Train, score and tabulate the recipes: everything in docs/results.md.

    python scripts/results.py                  # go on where it stopped, then write the page
    python scripts/results.py minutes=20       # begin no run after 20 minutes; call again
    python scripts/results.py only=demo        # runs whose name holds `demo`
    python scripts/results.py page             # the page alone, from the runs that are there
    python scripts/results.py list             # every run with its command line

A run is a run directory, outputs/results/TESTBED/RECIPE/seed-N, as the train command writes it, and
an evaluation.json as the evaluate command does; what the page reads of it is kept in docs/results.
Several of these scripts may work side by side: each takes runs that no other has begun.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from recipes import RUNS, Run
from results_page import write_page
from results_records import finished, read_record, write_record

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "results"
PAGE = ROOT / "docs" / "results.md"


def folder_of(run: Run) -> Path:
    """Return the run directory."""
    return FOLDER / run.name


def work(runs: list[Run], deadline: float) -> None:
    """Train and score what is missing, one run after the other."""
    missing = [run for run in runs if read_record(run) is None]
    print(f"{len(runs)} runs, {len(missing)} to do", flush=True)
    for run in missing:
        if time.monotonic() > deadline:
            print("the time is up: call again to go on")
            return
        folder = folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if read_record(run) is not None:
                continue
            began = time.perf_counter()
            scores = measure(run)
            cosines = " ".join(
                f"{name} {block['cosine']:.4f}" for name, block in scores["estimators"].items()
            )
            print(f"{run.name:<44} {cosines}  {time.perf_counter() - began:.0f} s", flush=True)


def measure(run: Run) -> dict[str, Any]:
    """Train and score one run; returns its evaluation."""
    from blip3o_lit.base.files import write_json
    from blip3o_lit.base.home import fits
    from blip3o_lit.checkpoints.load import load
    from blip3o_lit.cli.command import composed
    from blip3o_lit.config.evaluate import EvaluateConfig
    from blip3o_lit.config.train import TrainConfig
    from blip3o_lit.evaluation.readers import open_readers
    from blip3o_lit.evaluation.score import Scorer
    from blip3o_lit.training.run import run_training

    folder = folder_of(run)
    shutil.rmtree(folder)
    folder.mkdir()
    trainings = run.trainings(folder)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        began = time.process_time()  # the same on a busy machine
        for place, words in trainings.items():
            run_training(composed("train", TrainConfig, words), place, words)
        seconds = time.process_time() - began
        settings = [f"ckpt={folder}", *run.evaluation]
        config = composed("evaluate", EvaluateConfig, settings)
        loaded = load(config.ckpt, "cpu")
        readers = open_readers(loaded, config)
        scorer = Scorer(loaded, *readers, config, fits(), lambda *_: None)
        scores = scorer.run()
    write_json(folder / "evaluation.json", scores)
    for place in trainings:  # 100 runs of them would fill a small disk
        shutil.rmtree(place / "checkpoints")
    weights = sum(p.numel() for p in loaded.translator.network.parameters())
    write_record(run, scores, {"training_seconds": round(seconds), "parameters": weights})
    return scores


def main(words: list[str]) -> int:
    """Do what the words ask for; 2 for a word that means nothing."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    plain = {word for word in words if "=" not in word}
    if plain - {"page", "list"} or set(given) - {"minutes", "only"}:
        print("error: words are page, list, minutes=N and only=NAME", file=sys.stderr)
        return 2
    if "list" in plain:
        for run in RUNS:
            print(run.name)
            for place, words in run.trainings(Path("RUN")).items():
                line = " ".join([*words, f"hydra.run.dir={place}"])
                print(f"  python -m blip3o_lit.train {line}")
        return 0
    os.chdir(ROOT)
    deadline = time.monotonic() + 60 * float(given.get("minutes", "inf"))
    if "page" not in plain:
        work([run for run in RUNS if given.get("only", "") in run.name], deadline)
    found = finished()
    write_page(PAGE, found)
    print(f"{len(found)} of {len(RUNS)} runs are in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
