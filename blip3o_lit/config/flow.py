"""Flow group: the probability path, the network's output, the training times and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, one_of, positive, within

PATHS = ("linear", "trigonometric", "seed_linear", "seed_cosine")
PREDICTIONS = ("velocity", "sample", "noise")
TIMES = ("uniform", "logit_normal", "u_shaped")
TIME_ZERO_INPUTS = ("zero", "noise")
NORMALISE = ("none", "l2")
WEIGHTINGS = ("none", "velocity", "sample")


@dataclass(unsafe_hash=True)
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
    time_zero_share: float = 0.5
    """Share of training draws at exactly t = 0, where one evaluation is the posterior mean."""
    time_zero_input: str = "zero"
    """zero: at t = 0, where x_t is noise alone and says nothing of x1, a sample output is computed
    from zeros; noise: from the noise, as at all other times. Other outputs always see the noise."""
    weighting: str = "none"
    """Quantity whose squared error is minimised: none (the output itself), velocity or sample."""
    cls_weight: float = 1.0
    """Weight of the CLS token's squared error beside a patch token's, in mode=cls_patch."""
    cosine_weight: float = 1.0
    """Weight of 1 - cosine between the restored estimate of x1 and x1; it moves the minimiser
    towards what is reported. 0 where closed forms have to hold."""
    consistency_weight: float = 0.0
    """Weight of 1 - cosine of the token means of the same two: an image-level term."""
    semantic_weight: float = 0.0
    """Weight of the squared error of the estimate of x1."""
    auxiliary_from: float = 0.0
    """The terms on the estimate of x1 count only times from here on (the seeds: 0.5)."""
    contrastive_weight: float = 0.0
    """Weight of telling an image's tokens apart: InfoNCE of the restored estimate, temperature
    0.07."""
    regularization_weight: float = 0.0
    """Weight of the mean norm of an output token."""
    normalise: str = "none"
    """l2: unit-norm raw targets, as the seeds had. It can't be undone: outputs are unit-norm."""
    target_norm_scale: float = 1.0
    """Factor on the target tokens before noise is added; undone in sampling."""
    adaptive_scale: bool = False
    """Scale the output by the running ratio of target to output norm; undone in sampling."""
    adaptive_noise: bool = False
    """Noise of the target's own size: 0.3 root mean square + 0.7 std, running averages."""
    condition_dropout: float = 0.0
    """Share of samples trained without their condition, which solver.guidance_scale needs."""

    def __post_init__(self) -> None:
        """Check each value and the rules that join them."""
        one_of("flow.path", self.path, PATHS)
        one_of("flow.prediction", self.prediction, PREDICTIONS)
        one_of("flow.time", self.time, TIMES)
        one_of("flow.time_zero_input", self.time_zero_input, TIME_ZERO_INPUTS)
        one_of("flow.normalise", self.normalise, NORMALISE)
        one_of("flow.weighting", self.weighting, WEIGHTINGS)
        within("flow.sigma_min", self.sigma_min, 0.0, 0.5)
        within("flow.time_zero_share", self.time_zero_share, 0.0, 1.0)
        within("flow.auxiliary_from", self.auxiliary_from, 0.0, 1.0)
        within("flow.condition_dropout", self.condition_dropout, 0.0, 1.0)
        for key in (
            "cls_weight",
            "velocity_scale",
            "output_scale",
            "target_norm_scale",
            "time_std",
            "time_shift",
        ):
            positive(f"flow.{key}", getattr(self, key))
        for key in ("cosine", "consistency", "semantic", "contrastive", "regularization"):
            if (weight := getattr(self, f"{key}_weight")) < 0:
                raise UserError(f"flow.{key}_weight={weight} must not be negative")
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
    def standardised_target(self) -> bool:
        """Whether target tokens are standardised; unit-norm raw tokens are not."""
        return self.normalise == "none"

    @property
    def has_mean(self) -> bool:
        """Whether one evaluation at t = 0 gives E[x1|c].

        The noise output does not on any path (alpha(0) = 0); the velocity does not on seed_cosine,
        where alpha'(0) = 0 as well.
        """
        if self.prediction == "velocity":
            return self.path != "seed_cosine"
        return self.prediction == "sample"
