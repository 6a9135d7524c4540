"""Where the time of a training step goes, beside what arithmetic says it should take.

Every operator is timed from outside, where torch hands it on, medians of several steps:
torch.profiler keeps its records in the same heap, between the tensors, so that large ones find no
room and fault in fresh pages (on `base` it showed 100 ms for casts that take 16). The arithmetic
takes the FLOPs of the products over the matmul ceiling and the bytes of everything else (inputs
read once, outputs written once) over the speed of an addition, both measured in this process at the
network's own shapes.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceiling import additions, products
from benchmarks.timing import interleaved
from benchmarks.training import TOKENS, model_config, real_step

CASES = (("tiny", 8), ("base", 4))
"""Model and batch."""
SETTLING = 6
"""Steps until memory is laid out and no page is fresh."""
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
     r"|lerp|where|sigmoid.*|exp|masked_fill|fill|zero|normal|rms_norm.*|mse_loss.*)_?"),
)  # fmt: skip
"""Row and the aten operators that it gathers."""


def row_of(operator: str) -> str:
    """Return the row that an operator belongs to."""
    for row, pattern in ROWS:
        if re.fullmatch(pattern, operator):
            return row
    return "the rest"


class Operators(TorchDispatchMode):
    """Adds up seconds and bytes of each row's operators; views move no bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.moved: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, then add up its tensors."""
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        row = row_of(func.overloadpacket.__name__)
        self.seconds[row] += time.perf_counter() - began
        if not func.is_view and "empty" not in str(func):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.moved[row] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def table(
    name: str, batch: int, dtype: torch.dtype, steps: int = 9
) -> list[tuple[str, float, float]]:
    """Return row, measured ms and ms by arithmetic, the longest first, the whole step last."""
    config = model_config(name)
    step: Callable[[], None] = real_step(config, batch, dtype)
    multiply, flops = products(config, batch * TOKENS, dtype)
    add, moved_bytes = additions(config, batch * TOKENS, dtype)
    for _ in range(SETTLING):
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    watches: list[Operators] = []

    def watched() -> None:
        with Operators() as operators:
            step()
        watches.append(operators)

    seconds = interleaved(
        {"step": step, "watched": watched, "multiply": multiply, "add": add},
        rounds=steps,
        warm_up=0,
    )
    whole, flops = seconds["step"], flops / seconds["multiply"]
    speed = moved_bytes / seconds["add"]
    print(f"  ceilings: {flops / 1e9:.0f} GFLOP/s, {speed / 1e9:.1f} GB/s")
    counted = defaultdict(int)
    for operator, count in counter.get_flop_counts()["Global"].items():
        counted[row_of(str(operator).removeprefix("aten."))] += count
    ideal = {row: 1e3 * moved / speed for row, moved in watches[0].moved.items()}
    ideal |= {row: 1e3 * count / flops for row, count in counted.items()}
    measured = {
        row: 1e3 * statistics.median(one.seconds[row] for one in watches)
        for row in watches[0].seconds
    }
    rows = [(row, value, ideal.get(row, 0.0)) for row, value in measured.items()]
    rows.sort(key=lambda entry: -entry[1])
    outside = 1e3 * whole - sum(measured.values())
    return [
        *rows,
        ("Python, dispatch", outside, 0.0),
        ("step", 1e3 * whole, sum(ideal.values())),
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
