"""Where a run goes on from: an explicit checkpoint, or the newest sound one of the same config."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from blip3o_lit import checkpointing
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.secrets import masked
from blip3o_lit.config.train import TrainConfig

log = logging.getLogger("blip3o_lit")
# Keys that do not change what a run computes: they may differ between a run and its resumption.
FREE_KEYS = ("resume", "dry_run", "logger", "checkpoint", "strategy", "micro_batch_size")
FREE_KEYS += ("plan", "world", "gpu", "mfu")
FREE_TRAINER_KEYS = ("accelerator", "devices", "num_nodes", "log_every")
FREE_DATA_KEYS = ("threads", "verify")


def essential(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a plain config that decides what a run computes."""
    kept = {key: value for key, value in config.items() if key not in FREE_KEYS}
    trainer = kept.get("trainer", {})
    kept["trainer"] = {k: v for k, v in trainer.items() if k not in FREE_TRAINER_KEYS}
    kept["data"] = {k: v for k, v in kept.get("data", {}).items() if k not in FREE_DATA_KEYS}
    return kept


def config_hash(config: TrainConfig) -> str:
    """Return a hash of what decides the computation."""
    text = json.dumps(essential(asdict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """Return the checkpoint to go on from, or None for a fresh start.

    Args:
        config: The run's config; `resume` is null, `auto` or a path.
        run_dir: The run's own directory, which `auto` searches first.

    Raises:
        UserError: If the named checkpoint is missing, damaged or of another network.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser().resolve()
        if path.is_dir() and path.suffix != ".ckpt":
            found, _ = checkpointing.newest_sound(path)
            if found is None:
                raise UserError(f"resume={path}: no sound checkpoint in this run directory")
            path = found
        _check_network(config, path)
        return path
    for folder in [run_dir, *_same_config(config, run_dir)]:
        found, damaged = checkpointing.newest_sound(folder)
        for path in damaged:
            print(f"resume=auto passes over a damaged checkpoint: {path}")
        if found:
            _check_network(config, found)
            print(f"resume=auto goes on from {found}")
            return found
    print("resume=auto found no checkpoint of this config: starting fresh")
    return None


def _same_config(config: TrainConfig, run_dir: Path) -> list[Path]:
    """Return the runs beside and below `outputs/` with the same config hash, newest first."""
    wanted = config_hash(config)
    found = set()
    outputs = Path("outputs").resolve()
    places = [(run_dir.parent, "*/"), (outputs, "*/"), (outputs, "*/*/")]
    for root, depth in places:
        for facts in root.glob(f"{depth}environment.json"):
            try:
                same = json.loads(facts.read_bytes()).get("config_hash") == wanted
            except (OSError, ValueError, AttributeError):
                continue  # Another program's file of that name.
            if same and facts.parent != run_dir:
                found.add(facts.parent)
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def _check_network(config: TrainConfig, path: Path) -> None:
    """Refuse a checkpoint of another network; name every other key that differs."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if not checkpointing.is_sound(path):
        raise UserError(f"{path}: the checkpoint is damaged: use another one of its folder")
    saved = checkpointing.facts(path)["blip3o"]["config"]
    now, then = (_flat(essential(part)) for part in (masked(asdict(config)), saved))
    different = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    whole = ("batch_size", "optimizer.name")
    fixed = [key for key in different if key.startswith(("model.", "mode.")) or key in whole]
    fixed = [key for key in fixed if key not in ("model.compile", "model.activation_checkpointing")]
    if fixed:
        key = fixed[0]
        raise UserError(
            f"resume={path}: {key} was {then.get(key)} there and is {now.get(key)} here: "
            f"give {key}={then.get(key)}, or start afresh"
        )
    for key in different:
        message = f"resumed with {key}={now.get(key)}, was {then.get(key)}"
        print(message)
        log.warning(message)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as dotted keys."""
    out = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the plain config of a run directory."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file: not a run directory")
    return yaml.safe_load(path.read_text())
