"""A module's output is that of the caller's own thread, while others call the same module."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import nn

from blip3o_lit.towers.hook import output_of


def test_threads_get_the_outputs_of_their_own_calls() -> None:
    module, threads = nn.Identity(), 4
    together = Barrier(threads, timeout=30)

    def own(number: int) -> float:
        def call() -> None:
            together.wait()  # all hooks are there before any call
            module(torch.tensor(float(number)))
            together.wait()

        return float(output_of(module, call))

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(own, range(threads))) == [0.0, 1.0, 2.0, 3.0]
