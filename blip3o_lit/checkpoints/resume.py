"""Where a run goes on from: a checkpoint that is named, or the newest sound one of its own folder.

A run directory belongs to one run. `resume=auto` looks nowhere else, and a start in a folder that
holds a run already is refused unless it goes on with that run or overwrites it.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from blip3o_lit.base.files import read_json
from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.objects import is_url
from blip3o_lit.base.secrets import masked
from blip3o_lit.base.words import flatten
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.checkpoints.mirror import fetched
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.rate import AUTO
from blip3o_lit.config.train import TrainConfig

log = logging.getLogger("blip3o_lit")
# Keys that do not change what a run computes: they may differ between a run and its resumption.
FREE_KEYS = ("resume", "overwrite", "dry_run", "logger", "checkpoint", "strategy")
FREE_KEYS += ("micro_batch_size", "plan", "world", "gpu", "mfu", "disk")
PICTURE_KEYS = ("towers", "pixels", "split")
"""Count where a run encodes pictures itself; before it could, a run had none of them."""
FREE_TRAINER_KEYS = ("accelerator", "devices", "num_nodes", "log_every", "deterministic", "profile")
FREE_TRAINER_KEYS += ("memory_history", "extra")
OLDER_DEFAULTS = {"model.positions": "rope", "optimizer.muon_layers": "blocks"}
"""What stood in the sizes of `model=` and in `optimizer=muon` once: who goes on keeps it."""
FREE_DATA_KEYS = ("threads", "verify", "tower_batch", "cache", "cache_gb", "keep")


def essential(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a plain config that decides what a run computes."""
    trainer = _without(config.get("trainer", {}), FREE_TRAINER_KEYS)
    data = _without(config.get("data", {}), FREE_DATA_KEYS)
    if not data.get("images"):
        data, config = _without(data, ("images",)), _without(config, PICTURE_KEYS)
    if not config.get("data", {}).get("keep"):
        data = _without(data, ("keep_storage",))
    return _without(config, FREE_KEYS) | {"trainer": trainer, "data": data}


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def config_hash(config: TrainConfig) -> str:
    """Return a hash of what decides the computation."""
    text = json.dumps(essential(asdict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_used(config: TrainConfig, run_dir: Path) -> None:
    """Refuse to start a run in a folder that holds another one.

    All ranks judge alike, whenever they come: before its first step, which needs them all, a run
    writes neither a checkpoint nor a row of metrics.
    """
    if config.overwrite or config.resume == "auto":
        return
    if config.resume is not None and _is_within(_absolute(config.resume), run_dir):
        return
    if checkpointing.files_of(run_dir) or (config.resume is None and _rows(run_dir)):
        raise UserError(
            f"{run_dir} holds a run already: go on with it by resume=auto, or choose another "
            "hydra.run.dir"
        )


def _rows(run_dir: Path) -> list[dict[str, str]]:
    try:
        return read_rows(run_dir / "metrics.csv")
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: mend that, or choose another hydra.run.dir"
        ) from error


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _is_within(path: Path, run_dir: Path) -> bool:
    """Whether a path leads through a folder, by whatever name (`checkpoints` may be a link)."""
    above = (folder for folder in (path, *path.parents) if folder.is_dir())
    return run_dir.is_dir() and any(folder.samefile(run_dir) for folder in above)


def resolve_resume(config: TrainConfig, run_dir: Path, ranks: FirstRank = ALONE) -> Path | None:
    """Return the checkpoint to go on from, or None for a fresh start.

    The first of several ranks decides. A path in `config.resume` becomes that of the checkpoint;
    behind an address, the checkpoint is fetched.
    """
    wanted: str | None = ranks.finds(lambda: config.resume)
    config.resume = wanted
    if wanted is None:
        return None
    if wanted == "auto":
        path = _newest_of_own(run_dir, ranks)
        if path is not None:
            _reconcile(config, path)  # sound: it was read for that
            return path
        origin = ranks.finds(lambda: _origin(run_dir))
        if origin is None:
            print(
                f"resume=auto found no checkpoint in {run_dir}: starting fresh (hydra.run.dir "
                "chooses the folder that it goes on in)"
            )
            return None
        print(f"resume=auto found no checkpoint in {run_dir}: it began from {origin}")
        config.resume = wanted = str(origin)
    if is_url(wanted):
        path = fetched(wanted)
        _reconcile(config, path)
        return path
    path = _absolute(wanted)
    if path.is_dir() and path.suffix != ".ckpt":
        newest, _ = checkpointing.newest_to_resume(path, ranks)
        if newest is None:
            raise UserError(f"resume={path}: no sound checkpoint in this run directory")
        path = newest
    else:
        checkpointing.check_sound(path, ranks)
    _reconcile(config, path)
    config.resume = str(path)
    return path


def _newest_of_own(run_dir: Path, ranks: FirstRank) -> Path | None:
    """Return the newest sound checkpoint; a folder that has only others is refused."""
    path, damaged = checkpointing.newest_to_resume(run_dir, ranks)
    for other in damaged:
        print(f"resume=auto passes over a damaged checkpoint: {other}")
    names = ", ".join(file.name for file in checkpointing.files_of(run_dir))
    if path is None and names:
        raise UserError(
            f"resume=auto: {run_dir} has {names}, but no sound step or last checkpoint: give "
            "a sound one with resume=PATH, or choose another hydra.run.dir"
        )
    return path


def _origin(run_dir: Path) -> str | None:
    """Return the checkpoint of another run that the run of a folder was started from, if any."""
    config = run_dir / "config.yaml"
    resume = yaml.safe_load(config.read_text()).get("resume") if config.is_file() else None
    return None if resume == "auto" else resume


def _reconcile(config: TrainConfig, path: Path) -> None:
    """Refuse a config that can't go on with a checkpoint; keep what stays as it was there.

    That is the number of lr=auto, and defaults that have changed since.
    """
    saved = checkpointing.about(path)["config"]
    _keep_rate(config.optimizer, saved["optimizer"], path)
    _keep_defaults(config, saved)
    whole = ("batch_size", "optimizer.name", "optimizer.ema_profiles", "seed")
    if config.optimizer.name == "muon":
        whole += ("optimizer.muon_layers",)
    free = ("model.compile", "model.activation_checkpointing", "model.activation_budget")
    for key, then, now in changed(config, saved):
        if (key.startswith(("model.", "mode.")) and key not in free) or key in whole:
            raise UserError(
                f"resume={path}: {key} was {then} there and is {now} here: give {key}={then}, or "
                "start afresh"
            )


def _keep_rate(optimizer: OptimizerConfig, saved: dict[str, Any], path: Path) -> None:
    if optimizer.lr != AUTO:
        return
    if saved["lr"] != AUTO:
        raise UserError(
            f"resume={path}: optimizer.lr was {saved['lr']:g} there and is auto here: give "
            f"optimizer.lr={saved['lr']:g}, or start afresh"
        )
    optimizer.auto_lr = saved["auto_lr"]


def _keep_defaults(config: TrainConfig, saved: dict[str, Any]) -> None:
    for key, then, now in changed(config, saved):
        if then == OLDER_DEFAULTS.get(key):
            print(f"resume: it goes on with {key}={then}, which it was begun with, not {now}")
            group, name = key.split(".")
            setattr(getattr(config, group), name, then)


def differences(config: TrainConfig, path: Path) -> list[tuple[str, Any, Any]]:
    """Return key, value there and value here of all that decides a run and differs."""
    return changed(config, checkpointing.about(path)["config"])


def changed(config: TrainConfig, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the same of a stored config.

    A key that it is older than has its default there.
    """
    now, then, defaults = (
        {key: value for key, value in flatten(essential(part)).items() if value != {}}
        for part in (masked(asdict(config)), saved, asdict(TrainConfig()))
    )
    then = {key: value for key, value in defaults.items() if key in now} | then
    keys = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    return [(key, then.get(key), now.get(key)) for key in keys]


def say_resumed(config: TrainConfig, path: Path) -> None:
    """Tell what a run goes on from, and what is different from now on."""
    if config.resume == "auto":
        print(f"resume=auto goes on from {path}")
    for key, then, now in differences(config, path):
        message = f"resumed with {key}={now}, was {then}"
        print(message)
        log.warning(message)


def check_tokens(path: Path, facts: dict[str, Any]) -> None:
    """Refuse a checkpoint that was trained on other tokens, before anything is written."""
    there = checkpointing.about(path)["tokens"]
    if there.get("hash") != facts["hash"]:
        if "images" in facts and there.get("images", facts["images"]) != facts["images"]:
            raise UserError(
                f"resume={path}: the images of {facts['path']}, their captions or split.* have "
                "changed since: restore them, or start a new run"
            )
        then, now = (_stores(each) for each in (there, facts))
        for store in sorted(then.keys() | now.keys()) if len(then) + len(now) > 2 else ():
            if then.get(store) != now.get(store):
                what = "is new" if store not in then else "is not among the stores now"
                what = "or its weight has changed" if store in then and store in now else what
                raise UserError(
                    f"resume={path}: of the stores that it was trained on, {store} {what}: resume "
                    "with the same data.tokens, or start a new run"
                )
        raise UserError(
            f"resume={path}: it was trained on other data (store, mode, condition, target, subset"
            f"{', towers or pixels' if 'images' in facts else ''}): resume with the same data and "
            "mode, or start a new run"
        )


def _stores(facts: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the stores of a run's record by path, with content hash and weight."""
    listed = facts.get("stores") or [{**facts, "weight": None}]
    return {str(each["path"]): (each["hash"], each["weight"]) for each in listed}


def finished_result(
    config: TrainConfig, run_dir: Path, resumed: Path, steps: int
) -> dict[str, Any] | None:
    """Return the content of result.json if the run of this folder has nothing left to do.

    It would go on from `resumed`; `steps` are asked for. Where another run's checkpoint leaves
    nothing to do either, that is refused.
    """
    step = int(checkpointing.read_lazily(resumed)["global_step"])
    if not _is_within(resumed, run_dir):
        if step >= steps:
            raise UserError(
                f"resume={resumed}: it is at step {step} already, and {steps} are asked for: give "
                "a larger trainer.max_steps"
            )
        return None
    result = read_json(run_dir / "result.json")
    if not result.get("finished") or step < result["step"]:
        return None  # stopped, or an earlier checkpoint by its name
    # A run that stopped early is finished for the same configuration only.
    same = read_json(run_dir / "environment.json").get("config_hash") == config_hash(config)
    return result if same or result["step"] >= steps else None
