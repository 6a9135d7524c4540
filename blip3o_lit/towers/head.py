"""A tower's final norm and projection, held in fp32 whatever precision the tower runs in.

They turn tokens into the space where images and captions meet. The token store keeps them in
`heads.safetensors`, so that projected tokens, retrieval and zero-shot need no tower later.

Shape suffixes: B images, N tokens, C token width, P projection width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.norm import RmsNorm
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by the word that configures them."""


class TowerHead(nn.Module):
    """Final norm (LayerNorm, RMSNorm or none), then the projection."""

    weight_C: Tensor | None
    bias_C: Tensor | None
    projection_CP: Tensor | None
    projection_bias_P: Tensor | None
    logit_scale: Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        projection_CP: Tensor | None = None,
        logit_scale: Tensor | None = None,
        projection_bias_P: Tensor | None = None,
    ) -> None:
        """Copy the tensors, detached, in fp32.

        Args:
            norm: The tower's last norm; anything but a LayerNorm or an RMSNorm counts as none.
            projection_CP: Its projection, where it has a linear one.
            logit_scale: Log of the inverse softmax temperature (Radford et al. 2021, section 2.5).
            projection_bias_P: Bias of the projection (EVA02-CLIP has one).
        """
        super().__init__()
        self.kind = "layer" if isinstance(norm, nn.LayerNorm) else "none"
        if isinstance(norm, RmsNorm):
            self.kind = "rms"
        self.eps = float(getattr(norm, "eps", 0.0))
        named = {
            "weight_C": None if self.kind == "none" else norm.weight,
            "bias_C": norm.bias if self.kind == "layer" else None,
            "projection_CP": projection_CP,
            "projection_bias_P": projection_bias_P,
            "logit_scale": logit_scale,
        }
        for name, tensor in named.items():
            copy = None
            if isinstance(tensor, Tensor):
                copy = tensor.detach().clone(memory_format=torch.contiguous_format).float()
            self.register_buffer(name, copy, persistent=False)

    def normalise(self, tokens_BNC: Tensor) -> Tensor:
        """Apply the final norm in fp32; returns `[B, N, C]` in the dtype of the tokens."""
        width = tokens_BNC.shape[-1:]
        if self.kind == "layer":
            out = F.layer_norm(tokens_BNC.float(), width, self.weight_C, self.bias_C, self.eps)
        elif self.kind == "rms":
            out = F.rms_norm(tokens_BNC.float(), width, self.weight_C, self.eps)
        else:
            return tokens_BNC
        return out.to(tokens_BNC.dtype)

    def describe(self, normed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and metadata as `Tower.heads` promises.

        `heads.safetensors` has no place for a bias b after the projection W, so it moves into the
        LayerNorm's: the norm's bias gains d with d W = b, which has a solution where C >= P and W
        has full rank. Otherwise the projection is left out, and projected tokens are refused.

        Args:
            normed: Whether the stored tokens have the final norm already; then a bias has no place.
        """
        found = {
            "norm.weight": self.weight_C,
            "norm.bias": self.bias_C,
            "projection": self.projection_CP,
            "logit_scale": self.logit_scale,
        }
        bias_P, projection_CP = self.projection_bias_P, self.projection_CP
        if bias_P is not None and projection_CP is not None and not bias_P.is_meta:
            found |= self._fold_bias(projection_CP, bias_P, normed)
        tensors = {
            name: value if value.is_meta else value.cpu()
            for name, value in found.items()
            if value is not None
        }
        return tensors, {"norm": self.kind, "eps": repr(self.eps)}

    def _fold_bias(
        self, projection_CP: Tensor, bias_P: Tensor, normed: bool
    ) -> dict[str, Tensor | None]:
        shift_C = torch.linalg.lstsq(
            projection_CP.T.double().cpu(), bias_P.double().cpu()[:, None], driver="gelsd"
        ).solution[:, 0]
        left = shift_C @ projection_CP.double().cpu() - bias_P.double().cpu()
        if normed or self.bias_C is None or left.abs().max() > 1e-6:
            return {"projection": None}
        return {"norm.bias": (self.bias_C.double().cpu() + shift_C).float()}
