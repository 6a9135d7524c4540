"""The commands on the shim, one after another: commands.py FOLDER prints a JSON.

Pictures are extracted, a network is trained on their tokens in each number format, then evaluated
and asked for tokens. Kernels do nothing, so all values are zeros.
"""

import json
import sys
from pathlib import Path

import runs
import torch
from on_shim import Trace
from PIL import Image

from blip3o_lit import evaluate, extract, generate, train
from blip3o_lit.evaluation.main_pass import Group
from blip3o_lit.evaluation.tally import Reference, Tally

FOLDER = Path(sys.argv[1])
STORE, RUN = FOLDER / "store", FOLDER / "run"
SMALL = ("model.width=16", "model.depth=1", "model.heads=2", "model.kv_heads=1")
LINES = {
    "extract": (
        *(f"images={FOLDER / 'pictures'}", f"out={STORE}", "extract.device=cuda"),
        *("split.by=content", "split.fraction=0.4", "extract.batch_size=4"),
    ),
    "train": (
        *("data=tokens", f"data.tokens={STORE}", *SMALL, "model.mlp_width=16", "precision=auto"),
        *("model.compile=false", f"hydra.run.dir={RUN}", "trainer.max_steps=2", "batch_size=4"),
    ),
    "generate": (
        *(f"ckpt={RUN}", f"tokens={STORE}", f"out={FOLDER / 'generated'}", "solver=heun"),
        *("device=cuda", "solver.steps=2", "batch_size=2", "graphs=true"),
    ),
    "evaluate": (
        *(f"ckpt={RUN}", "baselines=none", "device=cuda", "solvers=[heun-2]", "curve=[euler-1]"),
        *("samples=2", "drawn_images=0", "graphs=true"),
    ),
}
COMMANDS = {"extract": extract, "train": train, "generate": generate, "evaluate": evaluate}


def pictures():
    (FOLDER / "pictures").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(FOLDER / "pictures" / f"{number}.png")


def scores_of_random_tokens():
    """Count on the CPU, on tokens of its own, what is scored: scores of zeros have no value."""
    infinite = torch.isfinite

    def result(tally, reference):
        shape, cpu = tally.scores.shape, torch.device("cpu")
        true_BND = torch.randn(8, shape.tokens, shape.width)
        mean_ND, sample_B = torch.zeros_like(true_BND[0]), torch.arange(8)
        own = Tally(lambda *_: (true_BND + 1, 1), mean_ND, shape, cpu, tally.breadth is not None)
        Group(8, truth := Reference(shape, cpu), {"own": own}).add((true_BND, true_BND, sample_B))
        scores = scored(own, truth)
        tally.maps = own.maps
        return scores | {"images": tally.images}

    scored, Tally.result = Tally.result, result
    torch.isfinite = lambda x: infinite(torch.zeros(x.shape) if x.is_cuda else x)


def main():
    pictures()
    runs.scores_of_zeros()
    found = {}
    for name, words in LINES.items():
        sys.argv = [name, *words]
        if name == "evaluate":
            scores_of_random_tokens()
        with Trace() as trace:
            COMMANDS[name].main()
        kernels = sum(trace.kernels.values())
        found[name] = {"kernels": kernels, "waits": trace.waits, "graphs": trace.graphs}
    print("JSON", json.dumps(found))


if __name__ == "__main__":
    main()
