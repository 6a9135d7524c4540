"""A tower's final norm and projection, held in fp32 whatever precision the tower runs in.

They turn tokens into the space where images and captions meet. The token store keeps them in
`heads.safetensors`, so that projected tokens, retrieval and zero-shot need no tower later.
"""

import torch
import torch.nn.functional as F
from timm.layers.norm import RmsNorm
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TowerHead(nn.Module):
    """Final norm, then the projection; the tensors are copied, detached, in fp32."""

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
        """Copy a tower's head; a `norm` but a LayerNorm or an RMSNorm counts as none.

        `logit_scale` is the log of the inverse softmax temperature (Radford et al. 2021, 2.5).
        """
        super().__init__()
        self.kind = "none"
        if isinstance(norm, nn.LayerNorm | RmsNorm):
            self.kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
        self.eps = float(getattr(norm, "eps", 0.0))
        self._copy("weight_C", norm.weight if self.kind != "none" else None)
        self._copy("bias_C", norm.bias if self.kind == "layer" else None)
        self._copy("projection_CP", projection_CP)
        self._copy("projection_bias_P", projection_bias_P)
        self._copy("logit_scale", logit_scale)

    def _copy(self, name: str, tensor: object) -> None:
        copy = None
        if isinstance(tensor, Tensor):
            copy = tensor.detach().clone(memory_format=torch.contiguous_format).float()
        self.register_buffer(name, copy, persistent=False)

    def normalise(self, tokens_BNC: Tensor) -> Tensor:
        """Apply the final norm in fp32; the result has the tokens' dtype."""
        width = tokens_BNC.shape[-1:]
        if self.kind == "layer":
            out = F.layer_norm(tokens_BNC.float(), width, self.weight_C, self.bias_C, self.eps)
        elif self.kind == "rms":
            out = F.rms_norm(tokens_BNC.float(), width, self.weight_C, self.eps)
        else:
            return tokens_BNC
        return out.to(tokens_BNC.dtype)

    def describe(self, normed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `Tower.heads` promises, of tokens that are `normed` already or not."""
        tensors = {
            "norm.weight": self.weight_C,
            "norm.bias": self.bias_C,
            "projection": self.projection_CP,
            "logit_scale": self.logit_scale,
        }
        bias_P, projection_CP = self.projection_bias_P, self.projection_CP
        if bias_P is not None and projection_CP is not None and not bias_P.is_meta:
            shifted_C = None if normed else self._with_projection_bias(projection_CP, bias_P)
            tensors |= {"projection": None} if shifted_C is None else {"norm.bias": shifted_C}
        on_cpu = {
            name: tensor if tensor.is_meta else tensor.cpu()
            for name, tensor in tensors.items()
            if tensor is not None
        }
        return on_cpu, {"norm": self.kind, "eps": repr(self.eps)}

    def _with_projection_bias(self, projection_CP: Tensor, bias_P: Tensor) -> Tensor | None:
        """Return the norm's bias with the projection's in it, or None where that can't be.

        `heads.safetensors` has no place for a bias b after the projection W, so the norm's gains d
        with d W = b, which has a solution where C >= P and W has full rank.
        """
        projection_CP, bias_P = projection_CP.double().cpu(), bias_P.double().cpu()
        solution = torch.linalg.lstsq(projection_CP.T, bias_P[:, None], driver="gelsd")
        shift_C = solution.solution[:, 0]
        error_P = shift_C @ projection_CP - bias_P
        if self.bias_C is None or error_P.abs().max() > 1e-6:
            return None
        return (self.bias_C.double().cpu() + shift_C).float()
