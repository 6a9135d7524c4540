"""What a run writes and says around its training: files, plan, result, the next command."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip3o_lit.base.files import replacing, write_json
from blip3o_lit.base.launcher import launch
from blip3o_lit.base.secrets import masked
from blip3o_lit.base.units import human_time
from blip3o_lit.base.words import pasteable
from blip3o_lit.budget.plan import Plan
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.in_place import remove
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.checkpoints.resume import config_hash
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.training.callbacks.checkpoints import Checkpoints
from blip3o_lit.training.callbacks.run_log import RunLog
from blip3o_lit.training.environment import environment
from blip3o_lit.training.overfit import Overfit

log = logging.getLogger("blip3o_lit")
console = Console()
WRITTEN = ("metrics.csv", "result.json", "history.json", "evaluation.json", "report.html")
"""What `overwrite=true` removes beside checkpoints and TensorBoard's; the rest is written anew."""


def is_rank_zero() -> bool:
    """Whether this process speaks for the run, before any process group exists."""
    return launch().first


def show_plan(the_plan: Plan, resumed: Path | None) -> None:
    """Print the plan, one labelled line each."""
    for label, value in masked(list(the_plan.rows())):
        console.print(f"[bold]{label:>14}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)
        log.info("%s: %s", label, value)
    if resumed:
        label = f"[bold]{'resumes from':>14}[/bold]"
        console.print(f"{label}  {escape(str(resumed))}", highlight=False, soft_wrap=True)
        log.info("resumes from: %s", resumed)


def write_run_files(
    config: TrainConfig, run_dir: Path, overrides: list[str], tokens_hash: str
) -> None:
    """Write config.yaml, overrides.txt and environment.json."""
    try:
        with replacing(run_dir / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(masked(asdict(config)), sort_keys=False))
    except OSError as error:
        raise UserError(f"{run_dir}: cannot write ({error}): set hydra.run.dir") from error
    (run_dir / "overrides.txt").write_text("".join(f"{o}\n" for o in masked(overrides)))
    facts = masked(environment()) | {"tokens": tokens_hash, "config_hash": config_hash(config)}
    write_json(run_dir / "environment.json", facts)


def remove_run(run_dir: Path) -> None:
    """Remove what a run and its evaluation wrote into a run directory, and nothing else.

    Raises:
        UserError: If the folder has such names, but was not written by a run.
    """
    named = [path for name in WRITTEN if (path := run_dir / name).is_file()]
    last = ("best.ckpt", "last.ckpt")
    files = checkpointing.files_of(run_dir)
    saved = [path for path in files if path.name in last or checkpointing.step_of(path) >= 0]
    events = list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    old = [*named, *saved, *events]
    if old and not (run_dir / "environment.json").is_file():
        raise UserError(
            f"overwrite=true: {run_dir} has {old[0].name}, but no environment.json as every run "
            "has: choose another hydra.run.dir"
        )
    for path in old:
        remove(path)


def write_result(
    trainer: Trainer,
    run_log: RunLog,
    checkpoints: Checkpoints,
    run_dir: Path,
    seconds: float,
    finished: bool,
    solver: str,
    overfit: Overfit | None = None,
) -> None:
    """Write result.json: what the run reached, for scripts and sweeps.

    The last scores come from metrics.csv, which has those of before a resumption too.
    """
    rows = read_rows(run_dir / "metrics.csv")
    validated = [row for row in rows if row.get("val/cosine")]
    best = {"step": checkpoints.best_step, "cosine": checkpoints.best_score}
    for row in validated:
        if int(row["step"]) == checkpoints.best_step and row.get("val/cosine_low"):
            best["cosine_ci95"] = [float(row["val/cosine_low"]), float(row["val/cosine_high"])]
    result = {
        "finished": finished,
        "step": trainer.global_step,
        "seconds": round(seconds, 2),
        "first_step_seconds": run_log.first_step_seconds,
        "best": best,
        "validation": {
            name.removeprefix("val/"): float(value)
            for name, value in (validated[-1] if validated else {}).items()
            if name.startswith("val/") and value
        },
        "train": {
            name.removeprefix("train/"): value if math.isfinite(value) else None
            for name, value in run_log.last.items()
        },
        "estimator": solver,
        "split": "validation",
    }
    if overfit is not None:
        result["overfit"] = overfit.to_dict()
    write_json(run_dir / "result.json", result)  # whole at once: a sweep's page may be reading
    history: dict[str, list[float | None]] = {}
    for column in rows[0] if rows else ():
        history[column] = [float(row[column]) if row[column] else None for row in rows]
    (run_dir / "history.json").write_text(json.dumps(history) + "\n")


def say_how_to_resume(run_dir: Path, step: int) -> None:
    """Tell an interrupted user, or a scheduler's log, where the run stands and how it goes on."""
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.exists():
        print(f"stopped at step {step}, before the first checkpoint of {run_dir}")
        return
    place = pasteable("hydra.run.dir", run_dir)
    print(f"stopped at step {step}; saved {last}")
    print(f"to go on, add to the same command: resume=auto {place}")
    if "SLURM_JOB_ID" in os.environ:
        print("scripts/train.sbatch requeues on the exit code 75, with resume=auto")


def say_finished(run_dir: Path, result: dict[str, Any]) -> None:
    """Tell that the run of a folder is finished, what it reached and the next command to type."""
    print(f"this run is finished, at step {result['step']}: a larger trainer.max_steps goes on")
    best = result["best"]
    if best["cosine"] is not None:
        score = f"{best['cosine']:.4f} at step {best['step']}"
        print(f"held-out cosine, EMA, {result['estimator']}, best: {score}")
    say_next(run_dir)


def say_next(run_dir: Path) -> None:
    """Print the run directory and the command that evaluates what is in it."""
    print(f"run directory: {run_dir}")
    best = checkpointing.best_of(run_dir)
    if best is not None:
        print("next: python -m blip3o_lit.evaluate", pasteable("ckpt", best))


def closing_table(
    trainer: Trainer,
    run_log: RunLog,
    checkpoints: Checkpoints,
    solver: str,
    run_dir: Path,
    seconds: float,
) -> None:
    """Print what the run reached and the next command to type."""
    table = Table(title=f"{trainer.global_step} steps in {human_time(seconds)}", show_header=False)
    if "train/loss" in run_log.last:
        table.add_row("training loss (last row)", f"{run_log.last['train/loss']:.4f}")
    if checkpoints.best_score is not None:
        table.add_row(
            f"held-out cosine, EMA, {solver}, best",
            f"{checkpoints.best_score:.4f} at step {checkpoints.best_step}",
        )
    if "val/cosine" in trainer.callback_metrics:
        last = float(trainer.callback_metrics["val/cosine"])
        table.add_row(f"held-out cosine, EMA, {solver}, last", f"{last:.4f}")
    console.print(table)
    say_next(run_dir)
