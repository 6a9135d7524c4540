"""The flow-matching objective: what the network is trained to put out, and how it is read back.

Training and sampling share one class, so that every scale put on in the loss is taken off in the
estimate by construction. Everything here is float32. There are three spaces:

    raw  --standardise-->  x1  --to_flow-->    y1    where the path from noise ends
    raw  <--restore------  x1  <--to_tokens--  y1

The caller takes the first step; with data.scale=raw or flow.normalise=l2 its x1 are raw tokens.
`to_flow` gives unit norm where asked for, times target_norm_scale: by default y1 = x1.

Shapes: x_BND, z_BND, t_B; B batch, N tokens, D target width. A network is any callable
(x_BND, t_B, condition) -> out_BND, with the end s_B of a map as a fourth argument for flow.pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.condition import dropped
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.flow.loss_record import LossRecord
from blip3o_lit.flow.pairs import Pairs, half_steps
from blip3o_lit.flow.path import over, path_named

Network = Callable[..., Tensor]
Restore = Callable[[Tensor], Tensor]

# Largest weight of flow.weighting: 1 / 0.05^2, JiT's clamp of the noise level (arXiv:2511.13720).
LARGEST_WEIGHT = 400.0
# Decay and bounds of the adaptive scale, as in seed 000.
ADAPTIVE_DECAY, ADAPTIVE_LOW, ADAPTIVE_HIGH = 0.99, 0.1, 10.0
# Shares of root mean square and std in the noise's scale, as there.
NOISE_RMS, NOISE_STD = 0.3, 0.7
# The contrastive temperature of seed 000.
TEMPERATURE = 0.07
# Least length in a cosine, as in torch: that of a zero vector is 0.
TINY = 1e-8


class FlowObjective(nn.Module):
    """Loss, estimate of x1 and velocity of one flow configuration."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.path = path_named(config.path, config.sigma_min, config.sigma_max)
        if config.adaptive_scale:
            self.register_buffer("adaptive", torch.ones(()))
        if config.adaptive_noise:
            self.register_buffer("noise", torch.ones(()))

    # The buffers' names stand in checkpoints and in metrics.csv, so they stay short.

    @property
    def adaptive_factor(self) -> Tensor:
        """Running factor on the output, with flow.adaptive_scale."""
        return self.get_buffer("adaptive")

    @property
    def noise_factor(self) -> Tensor:
        """Running factor on the noise, with flow.adaptive_noise."""
        return self.get_buffer("noise")

    def __getstate__(self) -> dict[str, Any]:
        # The path's functions can't be pickled, and the config says which it is.
        return {name: value for name, value in self.__dict__.items() if name != "path"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        config = self.config
        self.path = path_named(config.path, config.sigma_min, config.sigma_max)

    @property
    def blind_at_zero(self) -> bool:
        """Whether the output at t = 0 is computed from zeros.

        x_0 is independent of x1 given the condition, so E[x1|x_0, c] = E[x1|c]: noise there would
        only be something to unlearn.
        """
        return self.config.prediction == "sample" and self.config.time_zero_input == "zero"

    def scaled_noise(self, z_BND: Tensor) -> Tensor:
        """Turn standard normal noise into the noise of this flow."""
        return z_BND * self.noise_factor if self.config.adaptive_noise else z_BND

    def to_flow(self, x1_BND: Tensor) -> Tensor:
        """Turn tokens into the points y1 at which the path ends."""
        if self.config.normalise == "l2":
            x1_BND = F.normalize(x1_BND, dim=-1)
        return scaled(x1_BND, self.config.target_norm_scale)

    def to_tokens(self, y1_BND: Tensor) -> Tensor:
        """Undo `to_flow`, but for the norms that flow.normalise=l2 threw away: unit norm then."""
        if self.config.normalise == "l2":
            return F.normalize(y1_BND, dim=-1)
        return scaled(y1_BND, 1 / self.config.target_norm_scale)

    def predict(
        self,
        network: Network,
        condition: Any,
        x_BND: Tensor,
        t_B: Tensor,
        adapt_to_BND: Tensor | None = None,
        s_B: Tensor | None = None,
    ) -> Tensor:
        """Return the output in units of its unscaled target, float32.

        The only place where scales are put on an output: output_scale and the adaptive factor are
        part of the model, velocity_scale was on the training target and is divided out. In training
        the adaptive factor moves first, by this output and its target `adapt_to_BND`. With `s_B`
        it is the output of the maps from t to s.
        """
        if self.blind_at_zero:
            # A map that starts there does need its noise.
            mean_B = t_B == 0 if s_B is None else (t_B == 0) & (s_B == 0)
            x_BND = x_BND.masked_fill(over(mean_B, x_BND), 0)
        scale = self.config.output_scale / self.config.velocity_scale
        ends = () if s_B is None else (s_B,)
        out_BND = scaled(network(x_BND, t_B, condition, *ends).float(), scale)
        if not self.config.adaptive_scale:
            return out_BND
        if self.training and adapt_to_BND is not None:
            self._move_adaptive_factor(out_BND, adapt_to_BND)
        # A copy: processes average the factor in place before the backward pass reads this one.
        return out_BND * self.adaptive_factor.clone()

    def estimate(
        self, network: Network, condition: Any, x_BND: Tensor, t_B: Tensor, check: bool = True
    ) -> Tensor:
        """Return the estimate of y1 at points x_t: at t = 0 the posterior mean E[y1|c].

        `condition` is encoded or not; for `check` see Path.x1_from.

        Raises:
            UserError: If y1 has no value at one of the times.
        """
        out_BND = self.predict(network, condition, x_BND, t_B)
        return self.path.x1_from(self.config.prediction, out_BND, x_BND.float(), t_B, check)

    def velocity(
        self, network: Network, condition: Any, x_BND: Tensor, t_B: Tensor, check: bool = True
    ) -> Tensor:
        """Return dx_t/dt at (x_t, t); arguments and errors as in `estimate`."""
        out_BND = self.predict(network, condition, x_BND, t_B)
        return self.path.velocity_from(self.config.prediction, out_BND, x_BND.float(), t_B, check)

    def loss(
        self,
        network: Network,
        condition: Any,
        x1_BND: Tensor,
        z_BND: Tensor,
        t_B: Tensor,
        restore: Restore | None = None,
        drop_B: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> LossRecord:
        """Return the training loss of a batch.

        The squared error is taken between the scaled output and velocity_scale times the target:

            total = velocity_scale^2 mean_B(weight(t) mean_N(weight(token) squared error))
                    + regularization_weight velocity_scale mean |output token|
                    + sum of the terms on the estimate of x1, each with its weight.

        Args:
            network: The network.
            condition: Its condition; a tensor or `base.condition.Condition` where `drop_B` or
                `pairs` is given.
            x1_BND: Target tokens.
            z_BND: Standard normal noise.
            t_B: Training times, inside the output's usable interval (times.py keeps them there).
            restore: The caller's tokens to raw tokens; None where they are the same.
            drop_B: Samples trained without their condition: a grid is set to zero, in
                standardised space the mean token, and of words none is left.
            pairs: The draws that train the map, of a batch of at least one image: their target is
                what the network itself says by two half steps, for all terms alike.
        """
        config, path, prediction = self.config, self.path, self.config.prediction
        if drop_B is not None:
            condition = dropped(condition, drop_B)
        x1_BND, z_BND = x1_BND.float(), z_BND.float()
        y1_BND = self.to_flow(x1_BND)
        if config.adaptive_noise and self.training:
            self._move_noise_factor(y1_BND)
        z_BND = self.scaled_noise(z_BND)
        x_BND = path.interpolate(y1_BND, z_BND, t_B)
        s_B = None
        if pairs is not None:
            s_B = t_B.index_copy(0, pairs.rows_P, pairs.s_P)
            y1_BND = self._with_half_steps(network, condition, x_BND, y1_BND, t_B, s_B, pairs)
            x1_BND = self.to_tokens(y1_BND)
        target_BND = path.output(prediction, y1_BND, z_BND, t_B)

        out_BND = self.predict(network, condition, x_BND, t_B, target_BND, s_B)
        error_BN = F.mse_loss(out_BND, target_BND, reduction="none").mean(-1)
        total = config.velocity_scale**2 * (self._weight(t_B) * self._token_mean(error_BN)).mean()

        y1_hat_BND = path.x1_from(prediction, out_BND, x_BND, t_B, check=False)
        x1_hat_BND = self.to_tokens(y1_hat_BND)
        extra: dict[str, Tensor] = {}
        if config.regularization_weight > 0:
            extra["regularization"] = config.velocity_scale * out_BND.norm(dim=-1).mean()
        if config.semantic_weight > 0:
            error_B = (y1_hat_BND - y1_BND).square().flatten(1).mean(1)
            extra["semantic"] = self._late_mean(error_B, t_B)
        extra |= self._raw_terms(x1_hat_BND, x1_BND, t_B, restore or nn.Identity())
        for name, term in extra.items():
            total = total + getattr(config, f"{name}_weight") * term

        return LossRecord(
            total=total,
            mse_B=error_BN.mean(1).detach(),
            extra={name: term.detach() for name, term in extra.items()},
            path=path,
            prediction=prediction,
            y1_BND=y1_BND,
            z_BND=z_BND,
            t_B=t_B,
            x_BND=x_BND,
            target_BND=target_BND,
            out_BND=out_BND.detach(),
            x1_hat_BND=x1_hat_BND.detach(),
            rows_P=None if pairs is None else pairs.rows_P,
        )

    def _with_half_steps(
        self,
        network: Network,
        condition: Any,
        x_BND: Tensor,
        y1_BND: Tensor,
        t_B: Tensor,
        s_B: Tensor,
        pairs: Pairs,
    ) -> Tensor:
        """Return the points y1 with the pairs' targets in their places.

        The network is called without any pair, too: processes that share its weights wait for each
        other in it.
        """
        rows_P = pairs.rows_P if len(pairs.rows_P) else pairs.rows_P.new_zeros(1)
        condition = condition[rows_P]
        with torch.no_grad():
            encode = getattr(network, "encode", None)
            condition = condition if encode is None else encode(condition)

        def output(x_PND: Tensor, t_P: Tensor, s_P: Tensor) -> Tensor:
            return self.predict(network, condition, x_PND, t_P, s_B=s_P)

        target_PND = half_steps(output, self.path, x_BND[rows_P], t_B[rows_P], s_B[rows_P])
        return y1_BND.index_copy(0, pairs.rows_P, target_PND[: len(pairs.rows_P)])

    def _raw_terms(
        self, x1_hat_BND: Tensor, x1_BND: Tensor, t_B: Tensor, restore: Restore
    ) -> dict[str, Tensor]:
        """Return the terms on the estimate in the towers' own scale."""
        config, terms = self.config, {}
        if max(config.cosine_weight, config.consistency_weight, config.contrastive_weight) == 0:
            return terms
        raw_hat_BND, raw_BND = restore(x1_hat_BND), restore(x1_BND)
        if config.cosine_weight > 0:
            distance_B = 1 - token_cosine(raw_hat_BND, raw_BND).mean(1)
            terms["cosine"] = self._late_mean(distance_B, t_B)
        if config.consistency_weight > 0:
            distance_B = 1 - F.cosine_similarity(raw_hat_BND.mean(1), raw_BND.mean(1), dim=-1)
            terms["consistency"] = self._late_mean(distance_B, t_B)
        if config.contrastive_weight > 0:
            terms["contrastive"] = self._late_mean(contrastive(raw_hat_BND, raw_BND), t_B)
        return terms

    @torch.no_grad()
    def _move_adaptive_factor(self, out_BND: Tensor, target_BND: Tensor) -> None:
        """Set s <- 0.99 s + 0.01 clamp(mean |target| / mean |output|, 0.1, 10)."""
        ratio = target_BND.norm(dim=-1).mean() / out_BND.norm(dim=-1).mean()
        ratio = ratio.clamp(ADAPTIVE_LOW, ADAPTIVE_HIGH)
        self.adaptive_factor.lerp_(ratio, 1 - ADAPTIVE_DECAY)

    @torch.no_grad()
    def _move_noise_factor(self, y1_BND: Tensor) -> None:
        """Set s <- 0.99 s + 0.01 (0.3 mean |token| / sqrt(D) + 0.7 std)."""
        rms = y1_BND.norm(dim=-1).mean() / y1_BND.shape[-1] ** 0.5
        scale = NOISE_RMS * rms + NOISE_STD * y1_BND.std()
        self.noise_factor.lerp_(scale, 1 - ADAPTIVE_DECAY)

    def _weight(self, t_B: Tensor) -> Tensor:
        """Return the weight of each sample's squared error: the squared gain of `weighting`."""
        if self.config.weighting == "none":
            return torch.ones_like(t_B)
        gain_B = self.path.gain(self.config.prediction, self.config.weighting, t_B)
        return gain_B.square().clamp(max=LARGEST_WEIGHT)

    def _token_mean(self, error_BN: Tensor) -> Tensor:
        """Average over an image's tokens: the first, the CLS token, counts cls_weight times."""
        if self.config.cls_weight == 1:
            return error_BN.mean(1)
        weight_N = torch.ones_like(error_BN[0])
        weight_N[0] = self.config.cls_weight
        return (error_BN * weight_N).sum(1) / weight_N.sum()

    def _late_mean(self, term_B: Tensor, t_B: Tensor) -> Tensor:
        """Average a term over the batch, counting zero before flow.auxiliary_from."""
        return torch.where(t_B >= self.config.auxiliary_from, term_B, 0.0).mean()


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return x times a factor, x itself where that is 1: a pass over all tokens less."""
    return x if factor == 1 else x * factor


def token_cosine(a_BND: Tensor, b_BND: Tensor) -> Tensor:
    """Return the cosine of each pair of tokens [B, N].

    In fewer passes over all tokens than `F.cosine_similarity`, which divides both by their norms.
    """
    norm = torch.linalg.vector_norm
    lengths_BN = norm(a_BND, dim=-1).clamp_min(TINY) * norm(b_BND, dim=-1).clamp_min(TINY)
    return (a_BND * b_BND).sum(-1) / lengths_BN


def contrastive(estimate_BND: Tensor, true_BND: Tensor) -> Tensor:
    """Return the InfoNCE loss [B]: each estimated token has to be nearest to its own true token.

    Cosines of one image's tokens over the temperature, cross-entropy with the token itself as the
    right answer, mean over the tokens (van den Oord et al. 2018, arXiv:1807.03748).
    """
    estimate_BND, true_BND = F.normalize(estimate_BND, dim=-1), F.normalize(true_BND, dim=-1)
    logits_BNN = estimate_BND @ true_BND.mT / TEMPERATURE
    own_BN = logits_BNN.diagonal(dim1=1, dim2=2)
    return (logits_BNN.logsumexp(-1) - own_BN).mean(1)
