"""The schema of the train command: one field per group, and the keys that belong to no group."""

from dataclasses import dataclass, field
from typing import Any

from blip3o_lit.config.checks import above_zero, check_fields, choice
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import SplitConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.rate import AUTO, auto_rate
from blip3o_lit.config.solver import SolverConfig, check_solver, solver_from_label, started_later
from blip3o_lit.config.towers import PixelsConfig, TowersConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    PrecisionConfig,
    StrategyConfig,
    TrainerConfig,
)


def part_names(config: "TrainConfig") -> dict[str, str]:
    """Return by kind what a run is built from and another package may have registered."""
    return {
        "network": config.model.architecture,
        "path": config.flow.path,
        "solver": config.solver.name,
    }


@dataclass
class TrainConfig:
    """Everything that defines a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and switches of the network."""
    mode: ModeConfig = field(default_factory=ModeConfig)
    """View of the stored tokens."""
    data: DataConfig = field(default_factory=DataConfig)
    """Token store and reader."""
    towers: TowersConfig = field(default_factory=TowersConfig)
    """data=images: the pair of encoders."""
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    """data=images: how pictures become pixels."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """data=images: which images are held out."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Path, network output, times, loss."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Estimator that validation generates with."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, schedule, clipping, weight average."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number format."""
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """Single process, DDP or FSDP2."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length of the run and devices."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Loggers beside metrics.csv."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Callbacks of Lightning's or your own by name: a `_target_` and its arguments each."""
    seed: int = 0
    """Seed of weights, data order, noise and times."""
    batch_size: int = above_zero(32)
    """Images of one optimizer step, over all processes."""
    micro_batch_size: int | None = above_zero(None)
    """Images of one forward pass of one process; accumulation is derived. null: chosen to fit."""
    resume: str | None = None
    """auto: go on with the run of this run directory; or the checkpoint or run to go on from."""
    init_from: str | None = None
    """Begin a new run with the averaged weights of a run, checkpoint or export, name by name; a
    second time's embedding is left at its zero start. Not read where a checkpoint is resumed."""
    init_strict: bool = True
    """false: parts that are missing there, or have another size, stay at their start values."""
    init_statistics: str = choice("kept", ("kept", "new"))
    """Token scales with init_from: kept, those of its weights, or new, of this run's tokens."""
    overwrite: bool = False
    """Start afresh in a run directory that holds a run, whose files are removed."""
    dry_run: bool = False
    """Build everything and print the plan, but take no step."""
    plan: bool = False
    """Print what the run would cost on `world` GPUs, touching none, and stop."""
    world: int | None = above_zero(None)
    """plan: processes; null: trainer.devices * trainer.num_nodes."""
    gpu: str = "H100"
    """plan: the kind of GPU: H200, H100, A100, L40S, RTX 4090, or one of `budget/machine.py`."""
    mfu: float = above_zero(0.4)
    """plan: the share of the GPU's peak that training is taken to reach."""
    disk: float | None = above_zero(None)
    """plan of data=images: GB that a token store may take; null: what is free here."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.overwrite and self.resume is not None:
            raise UserError(
                f"overwrite=true starts afresh, resume={self.resume} goes on: give one of them"
            )
        if self.init_from is not None and self.resume not in (None, "auto"):
            raise UserError(
                f"init_from={self.init_from} begins a run, resume={self.resume} goes on with one: "
                "give one of them"
            )
        self.model.second_time |= self.flow.pairs > 0
        optimizer, model = self.optimizer, self.model
        if optimizer.lr == AUTO and optimizer.auto_lr is None:
            optimizer.auto_lr = auto_rate(optimizer.name, model.architecture, model.width)
        check_solver(self.flow, self.solver)
        if self.solver.name == "fitted":
            raise UserError("solver=fitted is fitted after training: give another one to train")
        for label in self.evaluation.estimators:
            solver = started_later(self.flow, solver_from_label(label), self.solver.start)
            check_solver(self.flow, solver)
            if solver.name == "fitted":
                raise UserError(f"evaluation.estimators=[{label}]: it is fitted after training")
        if self.flow.cls_weight != 1 and self.mode.name != "cls_patch":
            raise UserError(
                f"flow.cls_weight={self.flow.cls_weight:g}: mode={self.mode.name} has no CLS token "
                "to weigh: set mode=cls_patch or flow.cls_weight=1"
            )
