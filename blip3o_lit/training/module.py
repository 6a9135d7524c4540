"""The LightningModule: a network, its weight average, the flow objective and the token scales.

Shape suffixes: B images, N target tokens, D target width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from blip3o_lit import __version__
from blip3o_lit.base.condition import AnyCondition
from blip3o_lit.base.secrets import masked
from blip3o_lit.budget.plan import Plan
from blip3o_lit.checkpoints.files import FORMAT
from blip3o_lit.checkpoints.initial import InitialWeights
from blip3o_lit.checkpoints.soup import start_of
from blip3o_lit.config.registry import origins
from blip3o_lit.config.solver import SolverConfig, solver_from_label, started_later
from blip3o_lit.config.train import part_names
from blip3o_lit.flow import draws
from blip3o_lit.flow.draws import Stream
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.pairs import UNIFORMS, pair_times
from blip3o_lit.flow.times import training_times
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.models import power_average
from blip3o_lit.models.float8 import float8_blocks
from blip3o_lit.models.initialisation import is_sharded, local
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.batches import align_checkpoint
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.scales import identity_scales, standardised
from blip3o_lit.training.ema import ramped_decay, update_averages
from blip3o_lit.training.own_parts import check_plain
from blip3o_lit.training.schedule import adopt_settings, learning_rate_factor, settings_of
from blip3o_lit.training.timed_losses import TimedLosses
from blip3o_lit.translation.translator import Translator

LOSS_IMAGES = 64
"""Validation images, at most, whose loss is taken at fixed times."""
SAMPLED_SCORES = ("cosine", "norm_ratio")
LOGGED_SCORES = ("cosine", "cosine_centred", "mse", "r2", "norm_ratio")


class TranslationModule(LightningModule):
    """Trains a translator; `ema` is the fp32 weight average that validation and inference use."""

    def __init__(
        self, plan: Plan, data: TokenDataModule, initial: InitialWeights | None = None
    ) -> None:
        """Build the network from the run's seed and take the scales of `data`, which is open.

        What `initial` holds is put in the place of either.
        """
        super().__init__()
        self.config, self.shape, self.steps = plan.config, plan.shape, plan.steps
        self.precision = plan.placement.precision
        self.sharded = plan.placement.strategy == "fsdp2"
        self.store_facts, self.encoded = masked(data.facts), data.encoded
        with torch.device("meta"):
            self.network = build_network(self.config.model, self.shape)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.widths = self.config.optimizer.ema_profiles
        self.profiles = nn.ModuleList(copy.deepcopy(self.ema) for _ in self.widths)
        self.network.to(self.precision.weights)
        self.initial = initial
        self.start = initial.start if initial is not None else f"the seed {self.config.seed}"
        if self.config.precision.float8:
            float8_blocks(self.network)
        if not self.sharded:
            self._start(torch.device("cpu"))
        self.objective = FlowObjective(self.config.flow)
        # With data.scale=raw no side is standardised, with flow.normalise=l2 the target isn't.
        scales = identity_scales(self.shape)
        if self.config.data.scale != "raw":
            kept = () if self.config.flow.standardised_target else ("target_standardizer",)
            scales |= {name: getattr(data, name) for name in scales if name not in kept}
        self.condition_standardizer = scales.get("condition_standardizer")
        self.target_standardizer = scales["target_standardizer"]
        self.words_standardizer = scales.get("words_standardizer")
        if initial is not None:
            for name, scale in scales.items():
                initial.put(name, scale)
            initial.put("objective", self.objective)
        self.scores = TokenScores(data.target_standardizer.mean_NC, self.shape.target)
        self.held = data.validation if isinstance(data.validation, MixedReader) else None
        mean_ND = data.target_standardizer.mean_NC
        self.store_scores = nn.ModuleList(
            TokenScores(mean_ND, self.shape.target) for _ in (self.held.names if self.held else ())
        )
        checks = self.config.evaluation
        self.losses = TimedLosses(checks.loss_times) if checks.loss_times else None
        self.sampled = nn.ModuleList(copy.deepcopy(self.scores) for _ in checks.estimators)
        self.gradient_norm: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def _start(self, device: torch.device) -> None:
        """Give the networks memory and start values: no process ever holds more than its part."""
        averages = (self.ema, *self.profiles)
        for network in (self.network, *averages):
            network.to_empty(device=device)
        self.network.init_weights(self.config.seed)
        if self.initial is not None:
            self.initial.put("network", self.network)
            self.initial = None  # its memory
        for average in averages:
            average.fill_buffers()  # type: ignore[operator]
            for own, weight in zip(average.parameters(), self.network.parameters()):
                own.copy_(weight)

    def configure_model(self) -> None:
        """Shard the networks by block while they have no memory yet, where the strategy asks."""
        if not self.sharded or not next(self.network.parameters()).is_meta:
            return
        from blip3o_lit.training.fsdp2 import Fsdp2Strategy, shard

        assert isinstance(self.trainer.strategy, Fsdp2Strategy)
        compute = self.precision.products if self.precision.low else None
        for network in (self.network, self.ema, *self.profiles):
            shard(network, self.trainer.strategy.mesh, compute)  # type: ignore[arg-type]
        self._start(self.trainer.strategy.root_device)

    @property
    def translator(self) -> Translator:
        """The averaged network with its flow and scales."""
        scales = (self.condition_standardizer, self.target_standardizer)
        # Lightning's autocast covers mixed formats; bf16_true is all the module's own.
        mixed = self.precision.autocast is not None
        low = self.precision.products if self.precision.low and not mixed else None
        return Translator(self.ema, self.objective, *scales, low, self.words_standardizer)

    def standardised(self, condition: AnyCondition) -> AnyCondition:
        """Return a raw condition as the network reads it."""
        return standardised(condition, self.condition_standardizer, self.words_standardizer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        flow, seed = self.config.flow, self.config.seed
        batch = self.encoded(batch)
        if self.config.model.dropout > 0:
            # Masks are a function of step and rank, so resuming is exact.
            place = (seed, self.global_step, batch_idx, self.global_rank)
            torch.manual_seed(hash(place) % 2**63)
        condition = self.standardised(batch["condition"])
        x1_BND = self.target_standardizer.standardise(batch["target"])
        device, token_shape = x1_BND.device, tuple(x1_BND.shape[1:])
        who = (batch["sample"], batch["epoch"])
        z_BND = draws.noise(seed, Stream.TRAINING_NOISE, *who, token_shape, device=device)
        count = 3 + UNIFORMS if flow.pairs > 0 else 3
        uniforms_BU = draws.uniforms(seed, Stream.TRAINING_TIMES, *who, count=count)
        t_B, pairs, drop_B = training_times(uniforms_BU[:, :2], flow), None, None
        if flow.pairs > 0:
            t_B, pairs = pair_times(uniforms_BU[:, 3:], t_B, flow)
            pairs = pairs.to(device)
        if flow.condition_dropout > 0:
            drop_B = (uniforms_BU[:, 2] < flow.condition_dropout).to(device, non_blocking=True)
        t_B, restore = t_B.to(device, non_blocking=True), self.target_standardizer.restore
        loss = self.objective.loss(
            self.network, condition, x1_BND, z_BND, t_B, restore, drop_B, pairs
        )
        for buffer in self.objective.buffers():  # Scales that it adapts to its batches.
            if self.trainer.world_size > 1:  # Lightning's own mean has a barrier.
                dist.all_reduce(buffer)
                buffer /= self.trainer.world_size
        self._add_to_mean("train/loss", loss.total)
        if (self.global_step + 1) % self.config.trainer.log_every == 0:
            estimate, true = restore(loss.x1_hat_BND), batch["target"].float()
            cosine_B = F.cosine_similarity(estimate, true, dim=-1).mean(1)
            self._add_to_mean("train/cosine", loss.data_mean(cosine_B))
            if loss.pairs_mse is not None:
                self._add_to_mean("train/pairs_loss", loss.pairs_mse)
            self._add_to_mean("train/velocity_cosine", loss.velocity_cosine)
            self._add_to_mean("train/norm_ratio", loss.norm_ratio)
            for name, term in loss.extra.items():
                self._add_to_mean(f"train/{name}_loss", term)
            for name, scale in self.objective.named_buffers():
                self._add_to_mean(f"train/{name}_scale", scale.clone())
        return loss.total

    def _add_to_mean(self, name: str, value: Tensor) -> None:
        """Add a value to the means of the next logged row, without a device sync.

        Values that are not finite are left out: they are those of skipped steps.
        """
        value = value.detach()
        count = torch.isfinite(value).to(value.dtype)
        sum_and_count = torch.stack([value.nan_to_num(0, 0, 0), count])
        self._sums[name] = self._sums.get(name, 0) + sum_and_count

    def take_means(self) -> dict[str, float]:
        """Return the means over all steps and processes since the last call, by column name."""
        sums = torch.stack(list(self._sums.values())).double()
        pairs = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()  # type: ignore[union-attr]
        means = {
            name: total / count if count else math.nan
            for name, (total, count) in zip(self._sums, pairs)
        }
        self._sums.clear()
        return means

    def on_validation_epoch_start(self) -> None:
        for metric in (self.scores, self.losses, *self.store_scores, *self.sampled):
            if metric is not None:
                metric.reset()  # type: ignore[operator]
        self.ema.eval()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Generate the target tokens of held-out images and score them in the raw space."""
        solver, batch = self.config.solver, self.encoded(batch)
        sample = self.translator.generate(batch["condition"], batch["sample"], 0, solver)
        self.scores.update(sample.x1_BND, batch["target"], batch["valid"])
        if self.held is not None:
            store_B = torch.from_numpy(self.held.numbers(batch["sample"].numpy()))
            for number, scores in enumerate(self.store_scores):
                own_B = (store_B == number).to(batch["valid"].device) & batch["valid"]
                scores.update(sample.x1_BND, batch["target"], own_B)  # type: ignore[operator]
        if self.losses is not None and self._reaches(batch, batch_idx, LOSS_IMAGES):
            self.losses.update(self.translator, batch, _among(batch, LOSS_IMAGES))
        images = self.config.evaluation.estimator_images
        if not self._reaches(batch, batch_idx, images):
            return
        counted_B = _among(batch, images)
        for solver, scores in zip(self.estimators, self.sampled):
            sample = self.translator.generate(batch["condition"], batch["sample"], 0, solver)
            scores.update(sample.x1_BND, batch["target"], counted_B)  # type: ignore[operator]

    def _reaches(self, batch: dict[str, Tensor], batch_idx: int, images: int) -> bool:
        """Whether a batch is among those of the first images, on all ranks alike."""
        return batch_idx * len(batch["sample"]) * self.trainer.world_size < images

    @cached_property
    def estimators(self) -> list[SolverConfig]:
        """The solvers of evaluation.estimators."""
        flow, start = self.config.flow, self.config.solver.start
        labels = self.config.evaluation.estimators
        return [started_later(flow, solver_from_label(label), start) for label in labels]

    def on_validation_epoch_end(self) -> None:
        logged: dict[str, Any] = {}
        names = [f"{name}/" for name in (self.held.names if self.held else ())]
        for prefix, metric in zip(["", *names], (self.scores, *self.store_scores)):
            scores = metric.compute()  # type: ignore[operator]
            low, high = scores["cosine_ci95"]
            values = {name: scores[name] for name in LOGGED_SCORES if scores[name] is not None}
            values |= {"cosine_low": low, "cosine_high": high}
            logged |= {f"{prefix}{name}": value for name, value in values.items()}
        logged |= self.losses.compute() if self.losses is not None else {}
        for label, metric in zip(self.config.evaluation.estimators, self.sampled):
            sampled = metric.compute()  # type: ignore[operator]
            logged |= {f"{name}_{label}": sampled[name] for name in SAMPLED_SCORES}
        for name, value in logged.items():
            self.log(f"val/{name}", float(value), logger=False, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm and keep the norm for the log; skip a step whose norm is not finite.

        Lightning's own clipping refuses fused optimizers under mixed precision (2.6.6), though
        bf16 has no loss scale to undo.
        """
        limit, parameters = self.config.optimizer.clip_norm, list(self.network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if is_sharded(norm):
            from torch.distributed.tensor import Replicate

            norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)  # type: ignore[attr-defined]
        # Where it is not finite nothing is clipped, so that bad gradients can be told from others.
        nn.utils.clip_grads_with_norm_(parameters, limit, norm.nan_to_num(0, 0, 0))
        self.gradient_norm = local(norm)
        if not self.precision.loss_scale:  # The scaler skips overflowing steps itself.
            # What a loss scaler would set: the fused kernel then leaves weights and moments alone,
            # and nothing waits for the device.
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1
        decays = [ramped_decay(self.config.optimizer.ema_decay, step)]
        decays += [power_average.decay(width, step) for width in self.widths]
        update_averages([self.ema, *self.profiles], self.network, decays)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        config = self.config.optimizer
        # Fused AdamW unscales fp16 gradients itself, after they were clipped: keep it apart.
        optimizer = make_optimizer(self.network, config, not self.precision.loss_scale)
        self.settings = settings_of(optimizer)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, self.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Give a resumed optimizer, which has its checkpoint's settings, those of the config."""
        schedule = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, LambdaLR)
        adopt_settings(schedule, self.settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make Lightning's counters of micro-batches agree with the optimizer steps done."""
        self.start = start_of(checkpoint["blip3o"])
        align_checkpoint(checkpoint, self.trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to rebuild the translator: plain data only."""
        check_plain(checkpoint.get("callbacks", {}))
        checkpoint["blip3o"] = {
            "format": FORMAT,
            "version": __version__,
            "config": masked(asdict(self.config)),
            "shape": self.shape.to_dict(),
            "tokens": self.store_facts,
            "step": self.global_step,
            "parts": origins(part_names(self.config)),
            "start": self.start,
        }


def _among(batch: dict[str, Tensor], images: int) -> Tensor:
    """Return which samples of a batch are among the first images, and no padding."""
    return batch["valid"] & (batch["sample"] < images).to(batch["valid"].device)
