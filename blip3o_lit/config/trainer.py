"""Groups of one run: its length and devices, number format, validation, checkpoints, loggers."""

from dataclasses import dataclass, field
from typing import Any

from blip3o_lit.config.checks import above_zero, between, check_fields, choice
from blip3o_lit.config.errors import UserError

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "bf16_true", "fp16")
INSTEAD = {
    "accelerator": "trainer.accelerator",
    "strategy": "strategy=ddp",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "precision": "precision=bf16",
    "logger": "logger=[csv,wandb]",
    "callbacks": "+callbacks.NAME._target_=PACKAGE.CLASS",
    "max_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "val_check_interval": "evaluation.every",
    "check_val_every_n_epoch": "evaluation.every",
    "num_sanity_val_steps": "dry_run=true",
    "log_every_n_steps": "trainer.log_every",
    "enable_checkpointing": "checkpoint.every",
    "enable_progress_bar": "trainer.log_every",
    "enable_model_summary": "callbacks=model_summary",
    "accumulate_grad_batches": "micro_batch_size",
    "gradient_clip_val": "optimizer.clip_norm",
    "gradient_clip_algorithm": "optimizer.clip_norm",
    "deterministic": "trainer.deterministic",
    "use_distributed_sampler": "batch_size",
    "plugins": "precision=bf16 or strategy=ddp",
    "default_root_dir": "hydra.run.dir",
}
"""What this project sets itself of Lightning's Trainer, and the key that decides it."""


@dataclass
class TrainerConfig:
    """Length of the run and the devices it uses."""

    max_steps: int = above_zero(1000)
    """Optimizer steps."""
    max_epochs: int | None = above_zero(None)
    """Passes over the training images; set, it replaces max_steps."""
    accelerator: str = choice("auto", ("auto", "cpu", "gpu", "cuda", "mps"))
    """auto, cpu, gpu (cuda) or mps."""
    devices: str = "auto"
    """Devices (processes) per node: auto or a number."""
    num_nodes: int = above_zero(1)
    """Nodes."""
    log_every: int = above_zero(10)
    """Steps between two logged rows."""
    max_bad_steps: int = above_zero(10)
    """Steps in a row with gradients that are not finite, all skipped, before the run stops."""
    deterministic: bool = False
    """Only kernels that give the same bits each time; slower, and an error where there is none."""
    profile: list[int] | None = None
    """First and last step that rank 0 traces into `profile/` of the run; on CUDA memory too."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of Lightning's Trainer, as trainer.extra.limit_train_batches=3."""
    memory_history: bool = False
    """Note on CUDA which line allocates what, for the snapshot that is written on out of memory."""

    def __post_init__(self) -> None:
        check_fields(self, "trainer.")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise UserError(f"trainer.devices={self.devices} must be auto or a number from 1 on")
        steps = self.profile
        if steps is not None and (len(steps) != 2 or not 0 < steps[0] <= steps[1]):
            raise UserError(f"trainer.profile={steps} must be two steps, as [10,12]")
        for name in self.extra:
            if name in INSTEAD:
                raise UserError(
                    f"trainer.extra.{name} is set by this project itself: use {INSTEAD[name]}"
                )


@dataclass
class PrecisionConfig:
    """Number format of the forward and backward pass."""

    name: str = choice("auto", PRECISIONS)
    """fp32, tf32 (GPU), bf16 (mixed, fp32 weights), bf16_true (bf16 weights), fp16 (GPU) or auto.

    auto is bf16 where the device computes it faster, else fp32.
    """
    float8: bool = False
    """Products of the blocks in float8 beside bf16, by torchao (Ada, Hopper or newer GPUs)."""

    def __post_init__(self) -> None:
        check_fields(self, "precision.")
        if self.float8 and self.name not in ("auto", "bf16", "bf16_true"):
            raise UserError(f"precision.float8=true goes with precision=bf16, not {self.name}")


@dataclass
class StrategyConfig:
    """How the work is spread over processes."""

    name: str = choice("auto", ("auto", "single", "ddp", "fsdp2"))
    """auto (single, or ddp with several devices), single, ddp or fsdp2."""
    consolidated: bool = False
    """fsdp2: each checkpoint is one file, gathered on rank 0; false: a folder, written by all."""
    replicas: int = above_zero(1)
    """fsdp2: groups of processes that each hold a whole network in shards; with one for each node,
    weights are gathered inside a node and gradients alone cross between them."""
    timeout: float = above_zero(600.0)
    """Seconds that a rank waits for the others before the run ends."""

    def __post_init__(self) -> None:
        check_fields(self, "strategy.")


@dataclass
class EvaluationConfig:
    """Generation-based validation while training runs; the last step is always validated."""

    every: int = above_zero(500)
    """Steps between two validations."""
    images: int = above_zero(64)
    """Validation images to generate; the `evaluate` command uses the whole split."""
    loss_times: int = between(4, 0, 64)
    """Fixed times at which the loss of 64 of them, at most, is taken with the same noise each time;
    0: none."""
    estimators: list[str] = field(default_factory=list)
    """Further estimators that are validated beside the run's solver, as [heun-10]."""
    estimator_images: int = above_zero(16)
    """Images of those."""
    patience: int | None = above_zero(None)
    """Stop after so many validations without a better one; null never stops."""
    best_by: str = choice("cosine", ("cosine", "timed_loss"))
    """What makes a validation the best so far, for best.ckpt and patience: the highest cosine of
    generated tokens, or the least mean of the losses at loss_times, where there are many right
    answers and a cosine favours the blurred one."""
    overfit_at_least: float | None = None
    """Least cosine that generated tokens of the training images must reach at the end; the command
    exits with 1 below it."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.")
        if self.best_by == "timed_loss" and not self.loss_times:
            raise UserError(
                "evaluation.best_by=timed_loss needs losses, and evaluation.loss_times=0 takes "
                "none: give a number of times"
            )


@dataclass
class CheckpointConfig:
    """Checkpoints of a run; best.ckpt and last.ckpt are always kept."""

    every: int = above_zero(500)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 1
    """Step checkpoints to keep beside best and last; -1 keeps all."""
    asynchronous: bool = False
    """Write while training goes on, from a copy in the host's memory."""
    mirror: str | None = None
    """An address (s3://, gs://) to which the run's files are copied after each save."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint.")
        if self.keep < -1:
            raise UserError(f"checkpoint.keep={self.keep} must be -1 (all) or a number from 0 on")


@dataclass
class LoggerConfig:
    """Loggers; `logger=[tensorboard,wandb]` turns on several."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "blip3o_lit"
    """Project at Weights & Biases."""
    wandb_name: str | None = None
    """Run name at Weights & Biases."""
    wandb_offline: bool = False
    """Write the W&B run to disk only; WANDB_MODE=offline does the same."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Loggers of your own by name, as logger.NAME._target_=PACKAGE.CLASS logger.NAME.ARGUMENT=1."""
