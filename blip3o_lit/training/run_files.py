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
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip3o_lit.base.files import replacing, write_json
from blip3o_lit.base.secrets import masked
from blip3o_lit.base.units import human_time
from blip3o_lit.base.words import pasteable
from blip3o_lit.budget.plan import Plan
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.in_place import remove
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.checkpoints.resume import config_hash
from blip3o_lit.checkpoints.snapshots import FOLDER as AVERAGES
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.training.environment import environment
from blip3o_lit.training.overfit import Overfit
from blip3o_lit.training.trainer import Callbacks
from blip3o_lit.training.trainer_arguments import cut_by

log = logging.getLogger("blip3o_lit")
console = Console()
WRITTEN = ("metrics.csv", "result.json", "history.json", "evaluation.json", "report.html")
"""What `overwrite=true` removes beside checkpoints and TensorBoard's; the rest is written anew."""


def say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def print_rows(rows: list[tuple[str, str]]) -> None:
    for label, value in masked(rows):
        say(f"[bold]{label:>15}[/bold]  {escape(value)}")
        log.info("%s: %s", label, value)


def show_plan(plan: Plan, run_dir: Path, resumed: Path | None) -> None:
    rows = [*plan.rows(), ("run directory", str(run_dir))]
    print_rows(rows + ([("resumes from", str(resumed))] if resumed else []))


def show_time(steps: int, seconds: float) -> None:
    whole = f"about {human_time(steps * seconds)} on this machine"
    print_rows([("time", f"{whole}: {steps} steps of {seconds:.2g} s, measured, and validation")])


def write_run_files(
    config: TrainConfig, run_dir: Path, overrides: list[str], data: dict[str, Any]
) -> None:
    try:
        with replacing(run_dir / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(masked(asdict(config)), sort_keys=False))
    except OSError as error:
        raise UserError(f"{run_dir}: cannot write ({error}): set hydra.run.dir") from error
    lines = [f"{override}\n" for override in masked(overrides)]
    (run_dir / "overrides.txt").write_text("".join(lines))
    facts = masked(environment()) | {"tokens": data["hash"], "config_hash": config_hash(config)}
    if "stores" in data:
        facts["stores"] = masked(data["stores"])
    if cut := cut_by(config.trainer.extra):
        facts["cut"] = cut
    write_json(run_dir / "environment.json", facts)


def remove_run(run_dir: Path) -> None:
    """Remove what a run and its evaluation wrote into a run directory, and nothing else."""
    old = [run_dir / name for name in WRITTEN if (run_dir / name).is_file()]
    for path in checkpointing.files_of(run_dir):
        if path.name in ("best.ckpt", "last.ckpt") or checkpointing.step_of(path) >= 0:
            old.append(path)
    old += (run_dir / "tensorboard").glob("events.out.tfevents.*")
    old += (run_dir / AVERAGES).glob("step-*.safetensors")
    if old and not (run_dir / "environment.json").is_file():
        raise UserError(
            f"overwrite=true: {run_dir} has {old[0].name}, but no environment.json as every run "
            "has: choose another hydra.run.dir"
        )
    for path in old:
        remove(path)


def write_result(
    step: int,
    callbacks: Callbacks,
    run_dir: Path,
    seconds: float,
    finished: bool,
    config: TrainConfig,
    overfit: Overfit | None,
) -> dict[str, Any]:
    """Write result.json: what the run reached, for scripts and sweeps; and history.json.

    The last scores come from metrics.csv, which has those of before a resumption too.
    """
    rows = read_rows(run_dir / "metrics.csv")
    validated = [row for row in rows if row.get("val/cosine")]
    checkpoints, run_log = callbacks.checkpoints, callbacks.log
    best = {"step": checkpoints.best_step, "cosine": checkpoints.best_score}
    for row in validated:
        if int(row["step"]) == checkpoints.best_step and row.get("val/cosine_low"):
            best["cosine_ci95"] = [float(row["val/cosine_low"]), float(row["val/cosine_high"])]
    last = validated[-1] if validated else {}
    result = {
        "finished": finished,
        "step": step,
        "seconds": round(seconds, 2),
        "first_step_seconds": run_log.first_step_seconds,
        "best": best,
        "validation": {
            name.removeprefix("val/"): float(value)
            for name, value in last.items()
            if name.startswith("val/") and value
        },
        "train": {
            name.removeprefix("train/"): value if math.isfinite(value) else None
            for name, value in run_log.last.items()
        },
        "estimator": config.solver.label,
        "split": "validation",
    }
    if cut := cut_by(config.trainer.extra):
        result["cut"] = cut
    if overfit is not None:
        result["overfit"] = overfit.to_dict()
    write_json(run_dir / "result.json", result)  # whole at once: a sweep's page may be reading
    columns = rows[0] if rows else ()
    history = {name: [float(row[name]) if row[name] else None for row in rows] for name in columns}
    (run_dir / "history.json").write_text(json.dumps(history) + "\n")
    return result


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


def say_stopped_early(plan: Plan, step: int) -> None:
    checks = plan.config.evaluation
    why = "by a callback"
    if checks.patience:
        why = f"no better held-out {checks.best_by} in {checks.patience} validations"
    say(f"stopped early at step {step} of {plan.steps}: {why}")


def say_cut(plan: Plan, step: int) -> None:
    """Say that a run is no whole one, which its record says too."""
    keys = [
        f"trainer.extra.{key}={value}" for key, value in cut_by(plan.config.trainer.extra).items()
    ]
    say(f"cut at step {step} of {plan.steps} by {', '.join(keys)}: no finished run")


def say_finished(run_dir: Path, result: dict[str, Any]) -> None:
    print(f"this run is finished, at step {result['step']}: a larger trainer.max_steps goes on")
    for label, value in _scores(result):
        print(f"{label}: {value}")
    _say_next(run_dir)


def closing_table(run_dir: Path, result: dict[str, Any]) -> None:
    title = f"{result['step']} steps in {human_time(result['seconds'])}"
    table = Table(title=title, show_header=False)
    if result["train"].get("loss") is not None:
        table.add_row("training loss (last row)", f"{result['train']['loss']:.4f}")
    for label, value in _scores(result):
        table.add_row(label, value)
    console.print(table)
    _say_next(run_dir)


def _scores(result: dict[str, Any]) -> list[tuple[str, str]]:
    label, best = f"held-out cosine, EMA, {result['estimator']}", result["best"]
    rows = []
    if best["cosine"] is not None:
        rows.append((f"{label}, best", f"{best['cosine']:.4f} at step {best['step']}"))
    if "cosine" in result["validation"]:
        rows.append((f"{label}, last", f"{result['validation']['cosine']:.4f}"))
    return rows


def _say_next(run_dir: Path) -> None:
    print(f"run directory: {run_dir}")
    best = checkpointing.best_of(run_dir)
    if best is not None:
        print("next: python -m blip3o_lit.evaluate", pasteable("ckpt", best))
