"""What the commands do, as functions: for a notebook or a script, without Hydra's command line.

    from blip3o_lit.api import compose, evaluate, train

    config = compose("train", "experiment=demo", "trainer.max_steps=200")
    run = train(config, "outputs/notebook")
    print(evaluate(compose("evaluate", f"ckpt={run}"))["standing"])

`compose` takes the words of a command line and gives the same typed, checked config; dataclasses of
`blip3o_lit.config` can be built by hand as well. Mistakes are a `UserError`. The functions stand in
`blip3o_lit.api` and not in the package itself, whose names `train` and `evaluate` are modules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from blip3o_lit.config.commands import DoctorConfig, ExportConfig, GenerateConfig
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.train import TrainConfig

if TYPE_CHECKING:
    from blip3o_lit.tokens.store.index import TokenIndex

__all__ = ["UserError", "compose", "evaluate", "export", "extract", "generate", "train"]
SCHEMAS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "extract": ExtractConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "doctor": DoctorConfig,
}


@overload
def compose(
    command: Literal["train"], *words: str, config_dir: str | Path | None = None
) -> TrainConfig: ...
@overload
def compose(
    command: Literal["evaluate"], *words: str, config_dir: str | Path | None = None
) -> EvaluateConfig: ...
@overload
def compose(
    command: Literal["extract"], *words: str, config_dir: str | Path | None = None
) -> ExtractConfig: ...
@overload
def compose(
    command: Literal["generate"], *words: str, config_dir: str | Path | None = None
) -> GenerateConfig: ...
@overload
def compose(
    command: Literal["export"], *words: str, config_dir: str | Path | None = None
) -> ExportConfig: ...


def compose(command: str, *words: str, config_dir: str | Path | None = None) -> Any:
    """Return the config that a command's words give, as on the command line.

    Args:
        command: train, evaluate, extract, generate or export.
        *words: Overrides, as `model=tiny` and `optimizer.lr=1e-3`.
        config_dir: A folder with options of your own, as `--config-dir`.

    Raises:
        UserError: If a word is wrong, with the right one.
    """
    from blip3o_lit.cli.command import composed
    from blip3o_lit.config.errors import one_of

    one_of("command", command, SCHEMAS)
    folder = None if config_dir is None else str(config_dir)
    return composed(command, SCHEMAS[command], words, folder)


def train(config: TrainConfig, out: str | Path) -> Path:
    """Train into the folder `out`, which is then the run's, and return it.

    One process trains: `trainer.devices` above 1 and nodes are the command's. A run that stops at
    once, by `plan` or `dry_run`, leaves no checkpoint there.

    Raises:
        UserError: For a mistake in config, data or machine.
        SystemExit: As the command: 130 and 75 for a run that a signal stopped.
    """
    from dataclasses import replace

    import blip3o_lit.metrics  # noqa: F401  (before Lightning imports torchmetrics with all it has)
    from blip3o_lit.base.launcher import settle
    from blip3o_lit.training.run import run_training

    if config.trainer.devices not in ("auto", "1") or config.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.devices={config.trainer.devices}: several processes are started by the "
            "command alone: python -m blip3o_lit.train"
        )
    settle(config.trainer.num_nodes)
    config = replace(config, trainer=replace(config.trainer, devices="1"))
    run_training(config, Path(out), [])
    return Path(out)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a checkpoint; write and return the content of evaluation.json, with report.html."""
    return _command("evaluate")(config)


def extract(config: ExtractConfig) -> TokenIndex | None:
    """Turn pictures into a token store; return its index, or None where other workers go on."""
    from blip3o_lit.tokens.store.index import TokenIndex

    _command("extract")(config)
    out = Path(config.out or "").expanduser()
    return TokenIndex.load(out) if config.out and (out / "index.json").is_file() else None


def generate(config: GenerateConfig) -> None:
    """Generate the tokens of a store, or rank captions of pictures."""
    _command("generate")(config)


def export(config: ExportConfig) -> Path | None:
    """Write a checkpoint as a folder to share; return it."""
    return _command("export")(config)


def _command(name: str) -> Callable[[Any], Any]:
    from importlib import import_module

    return getattr(import_module(f"blip3o_lit.{name}"), name)
