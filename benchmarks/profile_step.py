"""Where the time of a training step goes, beside what arithmetic says it should take.

Times are torch.profiler's self times of a median-like step (the mean of several); the arithmetic
takes the FLOPs of the products over the matmul ceiling and the bytes of everything else (inputs
read once, outputs written once) over the speed of an addition, both measured in this process at
the network's own shapes.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceiling import addition_bytes, matmul_flops
from benchmarks.timing import interleaved
from benchmarks.training import TOKENS, model_config, real_step
from blip3o_lit.environment import keep_freed_memory

CASES = (("tiny", 8), ("base", 4))
"""Model and batch."""
ROWS = (
    ("matrix products", r"addmm|mm|linear|mkldnn|convolution"),
    ("attention products", r"bmm|baddbmm|scaled_dot.*|_flash_attention.*"),
    ("softmax", r"_?softmax|_softmax_backward_data"),
    ("AdamW", r"_fused_adamw_"),
    ("gradient norm, clipping", r"_foreach_(norm|mul_.*|clamp.*)|stack|linalg_vector_norm_all"),
    ("weight average", r"_foreach_lerp_"),
    ("casts, copies", r"_to_copy|copy_|clone|cat|roll|contiguous|_foreach_copy_|constant_pad_nd"),
    ("sums, means", r"sum|mean|linalg_vector_norm|std|norm"),
    ("elementwise", r"(mul|add|sub|div|addcmul|silu|silu_backward|rsqrt|square|neg|pow|gelu.*"
     r"|lerp|where|sigmoid.*|exp|masked_fill|fill|zero|normal|rms_norm.*)_?"),
)  # fmt: skip
"""Row and the aten operators that it gathers."""


def row_of(operator: str) -> str:
    """Return the row that an operator belongs to."""
    for row, pattern in ROWS:
        if re.fullmatch(pattern, operator):
            return row
    return "the rest"


def outermost(event: Any) -> str:
    """Return the operator that an event's time belongs to: of all tensors at once, if in one."""
    name, parent = event.name.removeprefix("aten::"), event.cpu_parent
    while parent is not None:
        outer = parent.name.removeprefix("aten::")
        if outer.startswith(("_foreach", "_fused")):
            return outer
        parent = parent.cpu_parent
    return name


class Bytes(TorchDispatchMode):
    """Counts the bytes that each operator reads and writes; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, then add up its tensors."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            tensors = [x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.moved[row_of(func.overloadpacket.__name__)] += moved
        return out


def table(
    name: str, batch: int, dtype: torch.dtype, steps: int = 4
) -> list[tuple[str, float, float]]:
    """Return row, measured ms and ms by arithmetic, the longest first, the whole step last."""
    keep_freed_memory()  # as a training run does
    config = model_config(name)
    step: Callable[[], None] = real_step(config, batch, dtype)
    flops = matmul_flops(config, batch * TOKENS, dtype)
    speed = addition_bytes(config, batch * TOKENS, dtype)
    print(f"  ceilings: {flops / 1e9:.0f} GFLOP/s, {speed / 1e9:.1f} GB/s")
    step()
    with FlopCounterMode(display=False) as counter, Bytes() as bytes_moved:
        step()
    whole = interleaved({"step": step}, rounds=steps)["step"]
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        profiled = (time.perf_counter() - began) / steps
    measured: dict[str, float] = defaultdict(float)
    for event in recorded.events() or ():
        if event.name.startswith("aten::"):
            measured[row_of(outermost(event))] += event.self_cpu_time_total / 1e3 / steps
    products = defaultdict(int)
    for operator, count in counter.get_flop_counts()["Global"].items():
        products[row_of(str(operator).removeprefix("aten."))] += count
    ideal = {row: 1e3 * moved / speed for row, moved in bytes_moved.moved.items()}
    ideal |= {row: 1e3 * count / flops for row, count in products.items()}
    rows = [(row, value, ideal.get(row, 0.0)) for row, value in measured.items()]
    rows.sort(key=lambda entry: -entry[1])
    outside = 1e3 * profiled - sum(measured.values())
    print(f"  a step takes {1e3 * whole:.1f} ms, {1e3 * profiled:.1f} ms under the profiler")
    return [
        *rows,
        ("Python, dispatch", outside, 0.0),
        ("step", 1e3 * profiled, sum(ideal.values())),
    ]


def run() -> list[dict[str, Any]]:
    """Print both tables as Markdown; nothing here has a target."""
    for name, batch in CASES:
        print(f"  {name}, batch {batch}, bf16")
        rows = table(name, batch, torch.bfloat16)
        whole = rows[-1][1]
        print("| part | ms | share | ms by arithmetic | share by arithmetic | gap, ms |")
        print("|---|---|---|---|---|---|")
        for row, value, ideal in rows:
            print(
                f"| {row} | {value:.1f} | {value / whole:.0%} | {ideal:.1f} "
                f"| {ideal / whole:.0%} | {value - ideal:.1f} |"
            )
    return []


if __name__ == "__main__":
    run()
    sys.exit(0)
