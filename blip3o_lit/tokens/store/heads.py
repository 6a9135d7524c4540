"""A tower's own final norm and projection, applied to stored tokens.

Shape suffixes: B samples, N tokens, C stored width, P width of the shared image-text space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blip3o_lit.config.errors import UserError

HEADS_FILE = "heads.safetensors"
NORMS = ("layer", "rms", "none")


class Head(nn.Module):
    """Final norm, then projection: tokens into the space that a tower shares with its captions."""

    weight_C: Tensor | None
    bias_C: Tensor | None
    projection_CP: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, str], normed: bool = False
    ) -> None:
        """Keep what `Tower.heads` returns, in fp32; of `normed` tokens only the projection."""
        super().__init__()
        self.norm = "none" if normed else facts.get("norm", "none")
        self.eps = float(facts.get("eps", "1e-5"))
        weight_C, bias_C = tensors.get("norm.weight"), tensors.get("norm.bias")
        self.register_buffer("weight_C", None if weight_C is None else weight_C.float())
        self.register_buffer("bias_C", None if bias_C is None else bias_C.float())
        self.register_buffer("projection_CP", tensors["projection"].float())

    @property
    def width(self) -> int:
        return self.projection_CP.shape[1]

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """Return the projected tokens `[B, N, P]` in fp32."""
        tokens_BNC = tokens_BNC.float()
        width = (tokens_BNC.shape[-1],)
        if self.norm == "layer":
            tokens_BNC = nn.functional.layer_norm(
                tokens_BNC, width, self.weight_C, self.bias_C, self.eps
            )
        elif self.norm == "rms":
            tokens_BNC = nn.functional.rms_norm(tokens_BNC, width, self.weight_C, self.eps)
        return tokens_BNC @ self.projection_CP

    @classmethod
    def load(cls, path: Path | str, array: str, normed: bool = False) -> Head:
        """Read the head of one array from a store's folder or a heads.safetensors file."""
        file = Path(path)
        file = file / HEADS_FILE if file.is_dir() else file
        if not file.is_file():
            raise UserError(
                f"{file} is missing, so {array} tokens can't be projected: "
                "set mode.projected=false or extract again"
            )
        prefix = f"{array}."
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {
                    name.removeprefix(prefix): opened.get_tensor(name)
                    for name in opened.keys()  # noqa: SIM118 (safe_open is no mapping)
                    if name.startswith(prefix)
                }
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: extract the tokens again") from error
        if "projection" not in tensors:
            raise UserError(f"{file} has no projection for {array}: set mode.projected=false")
        facts = {name.removeprefix(prefix): fact for name, fact in metadata.items()}
        head = cls(tensors, facts, normed)
        if head.norm not in NORMS:
            raise UserError(f"{file}: {array}.norm={head.norm} is unknown: update blip3o_lit")
        return head
