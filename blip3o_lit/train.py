"""Train a translator: `python -m blip3o_lit.train model=base mode=patch_only`."""

from blip3o_lit.base.launcher import settle
from blip3o_lit.base.words import pasteable
from blip3o_lit.cli.command import (
    command_line_overrides,
    in_multirun,
    is_running,
    run_command,
    run_directory,
    sweep_directory,
)
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig


def train(config: TrainConfig) -> float | None:
    """Run one training job and return its best held-out cosine."""
    settle(config.trainer.num_nodes)
    import blip3o_lit.metrics  # noqa: F401  (before Lightning imports torchmetrics with all it has)
    from blip3o_lit.training.run import run_training

    _refuse_unsafe_multirun(config)
    return run_training(config, run_directory(), command_line_overrides())


def check_parts(config: TrainConfig) -> None:
    """Refuse arguments that Lightning's Trainer lacks, and callbacks and loggers that don't exist.

    Lightning is imported for that where a config has any of them.
    """
    if config.trainer.extra or config.callbacks or config.logger.extra:
        import blip3o_lit.metrics  # noqa: F401
        from blip3o_lit.training.own_parts import check_own_parts
        from blip3o_lit.training.trainer_arguments import check_extra

        check_extra(config.trainer.extra)
        check_own_parts(config)


def _refuse_unsafe_multirun(config: TrainConfig) -> None:
    """Refuse several devices inside a sweep: ranks would re-run the sweep with other configs."""
    if not in_multirun():
        return
    many = config.trainer.devices not in ("auto", "1") or config.trainer.num_nodes > 1
    if config.trainer.devices == "auto" and config.strategy.name != "single":
        import torch

        many |= config.trainer.accelerator != "cpu" and torch.cuda.device_count() > 1
    if many:
        raise UserError(
            "-m with several devices would train different configs on different ranks: "
            "add hydra/launcher=process, which gives each job processes of its own, "
            "or trainer.devices=1"
        )


def _kept() -> str:
    """Say what Ctrl-C left outside of training steps: at imports, data, a second Ctrl-C.

    Imports nothing, as it may have been an import that was interrupted.
    """
    if not is_running():
        return "nothing was begun: give the same line again"
    if in_multirun():
        word = pasteable("hydra.sweep.dir", sweep_directory())
        return f"the jobs that ended are kept: to go on, give the same command with {word}"
    folder = run_directory().resolve()
    if not any((folder / "checkpoints").glob("*.ckpt")):
        return "no step was saved: give the same line again"
    return f"to go on, give the same command with resume=auto {pasteable('hydra.run.dir', folder)}"


def main() -> None:
    run_command("train", TrainConfig, train, _kept, check_parts)


if __name__ == "__main__":
    main()
