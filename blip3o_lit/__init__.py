"""Diffusion transformers that translate EVA-CLIP image tokens into CLIP tokens by flow matching."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BLIP3oInference", "__version__", "register"]

if TYPE_CHECKING:
    from blip3o_lit.config import registry as register
    from blip3o_lit.inference import BLIP3oInference


def __getattr__(name: str) -> Any:
    """Import what is named on first use, so that the command line stays fast."""
    if name == "BLIP3oInference":
        from blip3o_lit.inference import BLIP3oInference

        return BLIP3oInference
    if name == "register":
        from blip3o_lit.config import registry

        return registry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
