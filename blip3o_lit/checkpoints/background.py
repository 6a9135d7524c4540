"""Checkpoints written while training goes on: copied to the host first, then written in a thread.

A copy takes the memory of one checkpoint of this process, and keeps it for the next.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.models.initialisation import is_sharded, local


class Background:
    """Does the work of saving, in order: at once, or where `asynchronous` in one thread."""

    def __init__(self, asynchronous: bool = False) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoints") if asynchronous else None
        self._work: list[Future[None]] = []
        self._copies: dict[str, Tensor] = {}

    def do(self, work: Callable[[], None]) -> None:
        """Do it after all that was given before; not at all where that failed."""
        if self._pool is None:
            work()
            return
        before = self._work[-1] if self._work else None
        self._work.append(self._pool.submit(_in_turn, work, before))

    def wait(self) -> None:
        """Wait for all work; raises the error of what failed first."""
        work, self._work = self._work, []
        for future in work:
            future.result()

    def snapshot(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint as it is now, once the one before is written.

        Without a thread that is the checkpoint itself.
        """
        if self._pool is None:
            return checkpoint
        self.wait()
        copy = self._copy(checkpoint, "")
        if torch.cuda.is_available():  # What is done next, in the thread, waits for the copies.
            self.do(torch.cuda.current_stream().record_event().synchronize)
        return copy

    def _copy(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, f"{place}/{i}") for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        own, held = local(value), self._copies.get(place)
        if held is None or held.shape != own.shape or held.dtype != own.dtype:
            held = torch.empty_like(own, device="cpu", pin_memory=own.is_cuda)
            self._copies[place] = held
        held.copy_(own, non_blocking=True)
        if not is_sharded(value):
            return held
        from torch.distributed.tensor import DTensor  # takes seconds

        # DTensor.from_local would bring it back to the device of the mesh.
        return DTensor(held, value._spec, requires_grad=False)  # type: ignore[attr-defined, call-arg]


def _in_turn(work: Callable[[], None], before: Future[None] | None) -> None:
    if before is not None:
        before.result()
    work()
