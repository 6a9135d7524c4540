"""Flow group: the probability path, the network's output, the training times and the loss."""

from dataclasses import dataclass

from blip3o_lit.config import registry as register
from blip3o_lit.config.checks import above_zero, between, check_fields, choice, not_negative
from blip3o_lit.config.errors import UserError

PATHS = register.path.built_in
PREDICTIONS = ("velocity", "sample", "noise")


@dataclass(unsafe_hash=True)
class FlowConfig:
    """x_t = alpha(t) x1 + sigma(t) z; t = 0 is noise, t = 1 is data."""

    path: str = choice("linear", register.path)
    """linear, trigonometric, the seeds' seed_linear and seed_cosine, or one of a package's."""
    sigma_min: float = between(0.0, 0.0, 0.5)
    """Noise that is left at t = 1 (linear), or the seeds' sigma_min."""
    sigma_max: float = 1.0
    """The seeds' sigma_max; read by seed_linear and seed_cosine alone."""
    prediction: str = choice("sample", PREDICTIONS)
    """What the network outputs: velocity (dx/dt), sample (x1) or noise (z)."""
    velocity_scale: float = above_zero(1.0)
    """Factor on the training target; undone in sampling."""
    output_scale: float = above_zero(1.0)
    """Factor on the network's output; part of the model in training and in sampling."""
    time: str = choice("uniform", ("uniform", "logit_normal", "u_shaped"))
    """Distribution of training times: uniform, logit_normal or u_shaped (Beta(1/2, 1/2))."""
    time_mean: float = 0.0
    """Mean of the logit-normal."""
    time_std: float = above_zero(1.0)
    """Standard deviation of the logit-normal."""
    time_shift: float = above_zero(1.0)
    """Noise-level shift s: sigma' = s sigma / (1 + (s - 1) sigma); above 1 favours noise."""
    time_zero_share: float = between(0.5, 0.0, 1.0)
    """Share of training draws at exactly t = 0, where one evaluation is the posterior mean."""
    time_zero_input: str = choice("zero", ("zero", "noise"))
    """zero: at t = 0, where x_t is noise alone and says nothing of x1, a sample output is computed
    from zeros; noise: from the noise, as at all other times. Other outputs always see the noise."""
    weighting: str = choice("none", ("none", "velocity", "sample"))
    """Quantity whose squared error is minimised: none (the output itself), velocity or sample."""
    cls_weight: float = above_zero(1.0)
    """Weight of the CLS token's squared error beside a patch token's, in mode=cls_patch."""
    cosine_weight: float = not_negative(1.0)
    """Weight of 1 - cosine between the restored estimate of x1 and x1; it moves the minimiser
    towards what is reported. 0 where closed forms have to hold."""
    consistency_weight: float = not_negative(0.0)
    """Weight of 1 - cosine of the token means of the same two: an image-level term."""
    semantic_weight: float = not_negative(0.0)
    """Weight of the squared error of the estimate of x1."""
    auxiliary_from: float = between(0.0, 0.0, 1.0)
    """The terms on the estimate of x1 count only times from here on (the seeds: 0.5)."""
    contrastive_weight: float = not_negative(0.0)
    """Weight of telling an image's tokens apart: InfoNCE of the restored estimate, temperature
    0.07."""
    regularization_weight: float = not_negative(0.0)
    """Weight of the mean norm of an output token."""
    normalise: str = choice("none", ("none", "l2"))
    """l2: unit-norm raw targets, as the seeds had. It can't be undone: outputs are unit-norm."""
    target_norm_scale: float = above_zero(1.0)
    """Factor on the target tokens before noise is added; undone in sampling."""
    adaptive_scale: bool = False
    """Scale the output by the running ratio of target to output norm; undone in sampling."""
    adaptive_noise: bool = False
    """Noise of the target's own size: 0.3 root mean square + 0.7 std, running averages."""
    pairs: float = between(0.0, 0.0, 0.9)
    """Share of training draws that are pairs of times t < s and train the map from t to s by two
    half steps, for solver=map; the other shares are of the rest. 0: the network has no map."""
    condition_dropout: float = between(0.0, 0.0, 1.0)
    """Share of samples trained without their condition, which solver.guidance_scale needs."""

    def __post_init__(self) -> None:
        check_fields(self, "flow.")
        if self.path.startswith("seed_") and not self.sigma_min < self.sigma_max:
            raise UserError(
                f"flow.sigma_max={self.sigma_max} must be above flow.sigma_min={self.sigma_min}"
            )
        if self.time_zero_share > 0 and not self.has_mean:
            raise UserError(
                f"flow.path={self.path} flow.prediction={self.prediction} says nothing about x1 at "
                "t = 0: set flow.time_zero_share=0 or flow.prediction=sample"
            )

        if self.pairs > 0 and self.prediction != "sample":
            raise UserError(
                f"flow.pairs={self.pairs:g} trains maps of flow.prediction=sample: set that, not "
                f"{self.prediction}"
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
            own = register.path.own(self.path)
            return self.path != "seed_cosine" if own is None else bool(own.options.get("has_mean"))
        return self.prediction == "sample"
