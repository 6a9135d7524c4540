"""Model group: the size and the switches of the transformers."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from blip3o_lit.config import registry as register
from blip3o_lit.config.checks import above_zero, between, check_fields, choice
from blip3o_lit.config.errors import UserError

DIT_SWITCHES = (
    "positions",
    "time",
    "mlp",
    "norm",
    "sandwich_norm",
    "layer_scale",
    "dropout",
    "zero_init_output",
    "adapter_depth",
)


@dataclass(unsafe_hash=True)
class ModelConfig:
    """A diffusion transformer."""

    architecture: str = choice("dit", register.network)
    """dit: AdaLN-Zero transformer; nextdit: the Lumina-Next block of the official BLIP3-o; or a
    package's."""
    width: int = above_zero(768)
    """Channels of a hidden token; a multiple of heads."""
    depth: int = above_zero(12)
    """Number of transformer blocks."""
    heads: int = above_zero(12)
    """Query heads; width / heads, the head width, is a multiple of 4 (2-D rotary embedding)."""
    kv_heads: int = above_zero(4)
    """Key and value heads (grouped-query attention); divides heads."""
    mlp_width: int = above_zero(2048)
    """Hidden width of the feed-forward; 0 computes it: ffn_dim_multiplier * 8/3 * width, rounded
    up to a multiple of multiple_of."""
    ffn_dim_multiplier: float = above_zero(1.0)
    """Factor of the computed mlp_width."""
    multiple_of: int = above_zero(256)
    """Divisor of the computed mlp_width."""
    conditioning: str = choice("aligned", ("aligned", "cross"))
    """aligned: each condition token is added to the target token at its place; cross: attention."""
    key_rope: bool = True
    """Cross-attention rotates its keys as well as its queries; the official BLIP3-o does not."""
    positions: str = choice("rope", ("rope", "learned", "both", "none"))
    """rope: 2-D rotary embedding; learned: a vector added to each token; both, as every size of
    `model=` but nextdit has it; none."""
    time: str = choice("adaln", ("adaln", "tokens"))
    """Where time and pooled condition enter: adaln modulates each block; tokens adds once."""
    time_scale: float = above_zero(1000.0)
    """The time embedding is of time_scale * t: what is below 100 changes slowly with t."""
    second_time: bool = False
    """The network also takes the time s that a map ends at; flow.pairs above 0 turns it on."""
    mlp: str = choice("swiglu", ("swiglu", "gelu"))
    """Feed-forward: swiglu or gelu."""
    norm: str = choice("rms", ("rms", "layer"))
    """Norm of a hidden token: rms, or layer, which takes the mean out and has a bias."""
    sandwich_norm: bool = False
    """Also normalise what each branch adds."""
    layer_scale: float | None = above_zero(None)
    """Initial value of a learned factor a channel on each branch; null: none."""
    dropout: float = between(0.0, 0.0, 0.9)
    """Share of each branch's output that is dropped in training."""
    zero_init_output: bool = True
    """Start with an output of exactly zero."""
    adapter_depth: int = between(0, 0, 100)
    """Layers of a deep adapter on the condition, with a gated shortcut; 0: one linear map."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    activation_budget: float = between(1.0, 0.0, 1.0)
    """Share of a block's activations to keep; the rest is recomputed. The compiler chooses which;
    eager, attention's are kept and this share of the products'. 0: activation_checkpointing."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Keys of a package's own network, as model.options.KEY=1."""
    compile: str = choice("auto", ("auto", "true", "combined", "false"))
    """Compile each block in place with torch.compile; auto: on CUDA GPUs. combined: on CUDA, with
    kernels that need not wait for each other as one, which torch calls experimental."""

    def __post_init__(self) -> None:
        if self.mlp_width == 0:
            wanted = int(self.ffn_dim_multiplier * int(4 * 2 * self.width / 3))
            self.mlp_width = self.multiple_of * math.ceil(wanted / self.multiple_of)
        self.compile = str(self.compile).lower()  # a truth value in YAML and in older checkpoints
        check_fields(self, "model.")
        given = self.options
        self.options = register.network.with_defaults(self.architecture, given, "model.options.")
        if self.compile == "combined" and self.dropout:
            raise UserError("model.compile=combined has no random numbers: use true, or no dropout")
        self._check_heads()
        if self.architecture == "nextdit":
            self._check_nextdit()

    @property
    def kept_activations(self) -> float:
        """`activation_budget`, by either of the two keys."""
        return 0.0 if self.activation_checkpointing else self.activation_budget

    def _check_heads(self) -> None:
        """Check that width, heads and kv_heads divide each other."""
        if self.width % self.heads:
            raise UserError(f"model.width={self.width} is no multiple of model.heads={self.heads}")
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}"
            )
        if (self.width // self.heads) % 4:
            raise UserError(
                f"model.width={self.width} / model.heads={self.heads} is no multiple of 4, "
                "which the 2-D rotary embedding needs; change model.heads"
            )

    def _check_nextdit(self) -> None:
        """Refuse what the NextDiT block does not have."""
        if self.conditioning != "cross":
            raise UserError(
                "model.architecture=nextdit reads the condition by attention; "
                "use model.conditioning=cross"
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in DIT_SWITCHES and value != item.default:
                raise UserError(
                    f"model.{item.name}={value} is a switch of model.architecture=dit: take "
                    f"model=nextdit, which leaves it at {item.default}"
                )
