"""The schema of the evaluate command."""

from dataclasses import dataclass, field
from typing import Any

from blip3o_lit.config import registry as register
from blip3o_lit.config.checks import above_zero, check_fields, choice, several
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.optimizer import check_width
from blip3o_lit.config.solver import solver_from_label

BASELINE_SETS = {
    "none": (),
    "cheap": ("mean_token", "ridge"),
    "all": ("mean_token", "ridge", "mlp", "regression"),
}

OWN = "own"
"""In evaluation.json: the average that the run itself validates by."""


@dataclass
class EvaluateDataConfig:
    """Where the held-out tokens come from."""

    tokens: Any = several(None)
    """A token store, or several as in `train`; null: what the run was trained on."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")


@dataclass
class EvaluateConfig:
    """Everything that decides what `evaluation.json` says about a checkpoint."""

    ckpt: str = ""
    """A checkpoint file, a run directory, an exported folder or a hub id."""
    vs: str | None = None
    """Another checkpoint of the same tokens, compared image by image."""
    ema: list[float] = field(default_factory=list)
    """Widths of further averages of the run's weights, as [0.05,0.1,0.2], scored beside its own:
    from what a run with optimizer.ema_profiles stored."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    """Token store."""
    split: str = "validation"
    """Split of the store to score on."""
    same_data: bool = False
    """Score on training images instead; every number is then labelled so."""
    out: str | None = None
    """Folder for evaluation.json and report.html; null: the run directory of the checkpoint."""
    baselines: str = choice("cheap", BASELINE_SETS)
    """none, cheap (mean token, ridge) or all (a patch MLP and a noise-free transformer too)."""
    baseline_steps: int = above_zero(2000)
    """Training steps of MLP and noise-free transformer: the run's own number, but at most these."""
    baseline_images: int = above_zero(20000)
    """Training images that mean token and ridge are fitted on; all of them if fewer exist."""
    own_baselines: list[str] = field(default_factory=list)
    """Baselines that installed packages register, beside those."""
    metrics: list[str] = field(default_factory=list)
    """Scores that installed packages register, beside this one's own."""
    solvers: list[str] = field(default_factory=lambda: ["heun-10", "ab2-4"])
    """Estimators beside the posterior mean, as solver-steps, or guided: heun-10@1.5, mean@1.5;
    fitted-4 has 4 evaluations, and is fitted on the training split where none is stored."""
    guidance: list[float] = field(default_factory=list)
    """Guidance scales at which the first of `solvers` is scored too, as [1,1.5,2,3,4]."""
    curve: list[str] = field(
        default_factory=lambda: [
            *("euler-1", "euler-2", "euler-4", "euler-8", "euler-16"),
            *("heun-2", "heun-4", "heun-8"),
            *("ab2-2", "ab2-4", "ab2-8"),
        ]
    )
    """Points of the curve over network evaluations, as solver-steps; [] leaves it out."""
    curve_images: int = above_zero(64)
    """Images of that curve."""
    samples: int = 4
    """Samples per condition, by the first of `solvers`, for diversity and calibration; 0: none."""
    sample_images: int = above_zero(16)
    """Images of that."""
    solver_images: int | None = above_zero(None)
    """Of the scored images, those that the solvers draw samples of; null: all of them."""
    images: int | None = above_zero(None)
    """Images to score; null: the whole split."""
    drawn_images: int = 64
    """Images whose tokens are drawn, for PSNR, spread over those of the solvers; 0: none."""
    decoder: str | None = None
    """Folder or hub id of a decoder that draws tokens; null: a linear read-out is fitted."""
    pictures: str | None = None
    """Folder of the source images, to show the best and worst in the report; demo: not needed."""
    batch_size: int = above_zero(32)
    """Images per forward pass."""
    seed: int = 0
    """Seed of the sampling noise; each image has the same noise for every estimator."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    graphs: bool = False
    """On CUDA: launch a solver's kernels as one CUDA graph, which pays with small batches."""

    def __post_init__(self) -> None:
        if not self.ckpt:
            raise UserError("ckpt=PATH is missing: name a checkpoint or a run directory")
        check_fields(self)
        for width in self.ema:
            check_width("ema", width)
        if self.guidance and not self.solvers:
            raise UserError("guidance=[...] needs a solver in solvers=[], as heun-10")
        for name in self.own_baselines:
            one_of("own_baselines", name, register.baseline)
        for name in self.metrics:
            one_of("metrics", name, register.metric)
        for label in self.guided:
            solver_from_label(label)
        if self.drawn_images < 0:
            raise UserError(f"drawn_images={self.drawn_images} must be 0 or more")

    @property
    def guided(self) -> list[str]:
        """The labels of the guidance curve, as heun-10@1.5."""
        plain = self.solvers[0].partition("@")[0] if self.solvers else ""
        return [f"{plain}@{scale:g}" for scale in self.guidance]

    @property
    def estimators(self) -> list[str]:
        """All solvers that are scored, those of the guidance curve behind the others."""
        return [*self.solvers, *self.guided]
