"""Flow group: the probability path, the network's output, the training times and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, one_of, positive, within

PATHS = ("linear", "trigonometric", "seed_linear", "seed_cosine")
PREDICTIONS = ("velocity", "sample", "noise")
TIMES = ("uniform", "logit_normal", "u_shaped")


@dataclass
class FlowConfig:
    """x_t = alpha(t) x1 + sigma(t) z; t = 0 is noise, t = 1 is data."""

    path: str = "linear"
    """linear, trigonometric, or the seeds' seed_linear and seed_cosine."""
    sigma_min: float = 0.0
    """Noise that is left at t = 1 (linear), or the seeds' sigma_min."""
    sigma_max: float = 1.0
    """The seeds' sigma_max; read by seed_linear and seed_cosine alone."""
    prediction: str = "sample"
    """What the network outputs: velocity (dx/dt), sample (x1) or noise (z)."""
    velocity_scale: float = 1.0
    """Factor on the training target; undone in sampling."""
    output_scale: float = 1.0
    """Factor on the network's output; part of the model in training and in sampling."""
    time: str = "uniform"
    """Distribution of training times: uniform, logit_normal or u_shaped (Beta(1/2, 1/2))."""
    time_mean: float = 0.0
    """Mean of the logit-normal."""
    time_std: float = 1.0
    """Standard deviation of the logit-normal."""
    time_shift: float = 1.0
    """Noise-level shift s: sigma' = s sigma / (1 + (s - 1) sigma); above 1 favours noise."""
    time_zero_share: float = 0.25
    """Share of training draws at exactly t = 0, where one evaluation is the posterior mean."""
    cosine_weight: float = 0.0
    """Weight of 1 - cosine between the restored estimate of x1 and x1; it moves the minimiser."""

    def __post_init__(self) -> None:
        """Check each value and the rules that join them."""
        one_of("flow.path", self.path, PATHS)
        one_of("flow.prediction", self.prediction, PREDICTIONS)
        one_of("flow.time", self.time, TIMES)
        within("flow.sigma_min", self.sigma_min, 0.0, 0.5)
        within("flow.time_zero_share", self.time_zero_share, 0.0, 1.0)
        for key in ("velocity_scale", "output_scale", "time_std", "time_shift"):
            positive(f"flow.{key}", getattr(self, key))
        if self.cosine_weight < 0:
            raise UserError(f"flow.cosine_weight={self.cosine_weight} must not be negative")
        if self.path.startswith("seed_") and not self.sigma_min < self.sigma_max:
            raise UserError(
                f"flow.sigma_max={self.sigma_max} must be above flow.sigma_min={self.sigma_min}"
            )
        if self.time_zero_share > 0 and not self.has_mean:
            raise UserError(
                f"flow.path={self.path} flow.prediction={self.prediction} says nothing about x1 at "
                "t = 0: set flow.time_zero_share=0 or flow.prediction=sample"
            )

    @property
    def has_mean(self) -> bool:
        """Whether one evaluation at t = 0 gives E[x1|c].

        The noise output does not on any path (alpha(0) = 0); the velocity does not on seed_cosine,
        where alpha'(0) = 0 as well.
        """
        if self.prediction == "velocity":
            return self.path != "seed_cosine"
        return self.prediction == "sample"
