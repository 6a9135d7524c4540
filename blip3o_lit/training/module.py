"""The LightningModule: a network, its weight average, the flow objective and the token scales.

Shape suffixes: B images, N target tokens, D target width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from blip3o_lit import __version__
from blip3o_lit.base.shape import PairShape
from blip3o_lit.budget.placement import Placement
from blip3o_lit.checkpoints.files import FORMAT
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.flow import draws
from blip3o_lit.flow.draws import Stream
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.times import training_times
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.tokens.reading.batches import align_checkpoint
from blip3o_lit.tokens.statistics import Standardizer
from blip3o_lit.training.callbacks.bad_steps import StepRecord
from blip3o_lit.translation.translator import Translator


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak: warm-up, then decay.

    Args:
        config: The optimizer group.
        step: Optimizer steps done so far.
        steps: Optimizer steps of the whole run.
    """
    warmup = min(config.warmup_steps, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining


class TranslationModule(LightningModule):
    """Trains a translator; `ema` is the fp32 weight average that validation and inference use."""

    def __init__(
        self,
        config: TrainConfig,
        placement: Placement,
        plain_config: dict[str, Any],
        shape: PairShape,
        condition_standardizer: Standardizer,
        target_standardizer: Standardizer,
        tokens: dict[str, Any],
        steps: int,
    ) -> None:
        """Build the network from the run's seed.

        Args:
            config: The run's typed configuration.
            placement: Its layout.
            plain_config: The same as plain dicts, for the checkpoint.
            shape: Shapes of condition and target tokens, from the token index.
            condition_standardizer: Scale of the condition tokens.
            target_standardizer: Scale of the target tokens.
            tokens: Path and hash of the token store, for the checkpoint.
            steps: Optimizer steps of the whole run.
        """
        super().__init__()
        self.config = config
        self.sharded = placement.strategy == "fsdp2"
        self.plain_config = plain_config
        self.shape = shape
        self.tokens = tokens
        self.steps = steps
        with torch.device("meta"):
            self.network = build_network(config.model, shape)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.formats = placement.precision
        self.network.to(self.formats.weights)
        if not self.sharded:
            self._start(torch.device("cpu"))
        self.objective = FlowObjective(config.flow)
        raw = config.data.scale == "raw"
        self.condition_standardizer = (
            Standardizer.like(shape.condition) if raw else condition_standardizer
        )
        mean_NC = target_standardizer.mean_NC
        keep_scale = config.flow.standardised_target and not raw
        self.target_standardizer = (
            target_standardizer if keep_scale else Standardizer.like(shape.target)
        )
        self.scores = TokenScores(mean_NC, shape.target)
        self.gradient_norm: Tensor | None = None
        self.step_records: list[StepRecord] = []
        self.step_samples: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def _start(self, device: torch.device) -> None:
        """Give the networks memory and start values: no process ever holds more than its part."""
        for network in (self.network, self.ema):
            network.to_empty(device=device)
        self.network.init_weights(self.config.seed)
        self.ema.fill_buffers()
        for average, weight in zip(self.ema.parameters(), self.network.parameters()):
            average.copy_(weight)

    def configure_model(self) -> None:
        """Shard both networks by block while they have no memory yet, where the strategy asks."""
        if not self.sharded or not next(self.network.parameters()).is_meta:
            return
        from blip3o_lit.training.fsdp2 import shard

        assert self.device_mesh is not None
        compute = self.formats.products if self.formats.low else None
        for network in (self.network, self.ema):
            mesh = self.device_mesh["data_parallel"]
            shard(network, mesh, compute)
        self._start(self.trainer.strategy.root_device)

    @property
    def translator(self) -> Translator:
        """The averaged network with its flow and scales."""
        scales = (self.condition_standardizer, self.target_standardizer)
        # Lightning's autocast covers mixed formats; bf16_true is all the module's own.
        mixed = self.formats.autocast is not None
        low = self.formats.products if self.formats.low and not mixed else None
        return Translator(self.ema, self.objective, *scales, autocast=low)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the flow-matching loss of one micro-batch."""
        who = (batch["sample"], batch["epoch"])
        self.step_samples.append(batch["sample"])
        if (
            self.config.model.dropout > 0
        ):  # Masks are a function of step and rank, so resuming is exact.
            place = (self.config.seed, self.global_step, batch_idx, self.global_rank)
            torch.manual_seed(hash(place) % 2**63)
        condition = self.condition_standardizer.standardise(batch["condition"])
        x1_BND = self.target_standardizer.standardise(batch["target"])
        seed = self.config.seed
        shape = tuple(x1_BND.shape[1:])
        z_BND = draws.noise(seed, Stream.TRAINING_NOISE, *who, shape, device=x1_BND.device)
        uniforms_B3 = draws.uniforms(seed, Stream.TRAINING_TIMES, *who, count=3)
        t_B = training_times(uniforms_B3[:, :2], self.config.flow)
        t_B = t_B.to(x1_BND.device, non_blocking=True)
        share = self.config.flow.condition_dropout
        drop_B = (uniforms_B3[:, 2] < share).to(x1_BND.device) if share > 0 else None
        restore = self.target_standardizer.restore
        terms = self.objective.loss(self.network, condition, x1_BND, z_BND, t_B, restore, drop_B)
        for buffer in self.objective.buffers():  # Scales that it adapts to its batches.
            if self.trainer.world_size > 1:
                buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))  # type: ignore[arg-type]
        self._remember("train/loss", terms.total)
        if (self.global_step + 1) % self.config.trainer.log_every == 0:
            estimate, true = restore(terms.x1_hat_BND), batch["target"].float()
            self._remember("train/cosine", F.cosine_similarity(estimate, true, dim=-1).mean())
            self._remember("train/velocity_cosine", terms.velocity_cosine)
            self._remember("train/norm_ratio", terms.norm_ratio)
            for name, term in terms.extra.items():
                self._remember(f"train/{name}_loss", term)
            for name, scale in self.objective.named_buffers():
                self._remember(f"train/{name}_scale", scale.clone())
        return terms.total

    def _remember(self, name: str, value: Tensor) -> None:
        """Add a value to the sums that the next logged row averages, without a device sync.

        Values that are not finite are left out: they are those of skipped steps.
        """
        finite = torch.isfinite(value.detach())
        for key, number in ((name, value.detach().nan_to_num(0, 0, 0)), (f"{name}/count", finite)):
            self.sums[key] = self.sums.get(key, torch.zeros_like(value.detach())) + number

    def drain(self) -> dict[str, float]:
        """Return the means of what was remembered since the last call, over all processes."""
        names = [name for name in self.sums if not name.endswith("/count")]
        sums = torch.stack([self.sums[key] for name in names for key in (name, f"{name}/count")])
        sums = self.trainer.strategy.reduce(sums.double(), reduce_op="sum")
        values = sums.tolist()
        self.sums = {}
        pairs = zip(names, values[::2], values[1::2])
        return {name: total / count if count else math.nan for name, total, count in pairs}

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.scores.reset()
        self.ema.eval()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Generate the target tokens of held-out images and score them in the raw space."""
        solver = self.config.solver
        made = self.translator.generate(batch["condition"], batch["sample"], 0, solver)
        self.scores.update(made.x1_BND, batch["target"], batch["valid"])

    def on_validation_epoch_end(self) -> None:
        """Log the held-out scores."""
        scores = self.scores.compute()
        names = ("cosine", "cosine_centred", "mse", "r2", "norm_ratio")
        for name in names:
            if scores[name] is not None:
                self.log(f"val/{name}", float(scores[name]), logger=False, sync_dist=True)
        for end, value in zip(("low", "high"), scores["cosine_ci95"], strict=True):
            self.log(f"val/cosine_{end}", value, logger=False, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm and keep the norm for the log.

        Lightning's own clipping refuses fused optimizers under mixed precision (2.6.6), though
        bf16 has no loss scale to undo.
        """
        limit = self.config.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        full = getattr(norm, "full_tensor", None)
        norm = norm.detach() if full is None else full().detach()
        finite = torch.isfinite(norm)
        self.gradient_norm = norm
        self.step_records.append(StepRecord(self.global_step + 1, finite, self.step_samples))
        self.step_samples = []
        if self.formats.loss_scale:
            return  # the loss scaler skips overflowing steps itself
        if full is None:
            # What a loss scaler would set: the fused kernel then leaves weights and moments alone,
            # and nothing waits for the device.
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        elif not finite:
            optimizer.zero_grad()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the optimizer and its schedule by step."""
        config = self.config.optimizer
        # Fused AdamW unscales fp16 gradients itself, after they were clipped: keep it apart.
        optimizer = make_optimizer(self.network, config, not self.formats.loss_scale)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, self.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make Lightning's counters of micro-batches agree with the optimizer steps done."""
        align_checkpoint(checkpoint, self.trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to rebuild the translator: plain data only."""
        checkpoint["blip3o"] = {
            "format": FORMAT,
            "version": __version__,
            "config": self.plain_config,
            "shape": self.shape.to_dict(),
            "tokens": self.tokens,
            "step": self.global_step,
        }
