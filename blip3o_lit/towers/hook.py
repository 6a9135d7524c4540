"""What a module inside a network returns during one call, in the thread that makes the call."""

from collections.abc import Callable
from threading import get_ident
from typing import Any

from torch import nn


def output_of(module: nn.Module, call: Callable[[], Any]) -> Any:
    """Run `call` and return what `module` returned in it, first; other threads may run it too."""
    seen: list[Any] = []
    caller = get_ident()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if get_ident() == caller:  # a hook sees every thread's calls
            seen.append(output)

    hook = module.register_forward_hook(keep)
    try:
        call()
    finally:
        hook.remove()
    return seen[0]
