"""Freed memory stays with the process, whichever thread asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from blip3o_lit.environment import keep_freed_memory
from blip3o_lit.tokens.loader import prefetch

if {keep}:
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for number, batch in enumerate(prefetch((lambda: torch.ones(1 << 20) for _ in range(120)), 2)):
    if number == 40:
        before = faults()
    del batch
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_batches_of_reader_threads_come_in_pages_that_are_there() -> None:
    found = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keep=keep)], text=True))
        for keep in (True, False)
    ]
    # 80 tensors of 1,024 pages each; with a heap a thread most of them were fresh.
    assert found[0] < 8_000
    assert found[1] > 4 * found[0]
