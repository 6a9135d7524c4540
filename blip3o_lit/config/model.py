"""Model group: the size and the switches of the diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, one_of, positive

CONDITIONINGS = ("aligned", "cross")


@dataclass
class ModelConfig:
    """A diffusion transformer (DiT)."""

    width: int = 768
    """Channels of a hidden token; a multiple of heads."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Query heads; width / heads, the head width, is a multiple of 4 (2-D rotary embedding)."""
    kv_heads: int = 4
    """Key and value heads (grouped-query attention); divides heads."""
    mlp_width: int = 2048
    """Hidden width of the SwiGLU feed-forward."""
    conditioning: str = "aligned"
    """aligned: each condition token is added to the target token at its position; cross: attention."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each block in place with torch.compile."""

    def __post_init__(self) -> None:
        """Check each value and the rules that join them."""
        for key in ("width", "depth", "heads", "kv_heads", "mlp_width"):
            positive(f"model.{key}", getattr(self, key))
        one_of("model.conditioning", self.conditioning, CONDITIONINGS)
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
