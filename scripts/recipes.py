"""The runs behind docs/results.md: testbeds, recipes, seeds, as command-line overrides.

Networks are small and runs short: the demo's own. Within a testbed every recipe has the same
tokens, images and steps, hence the same network FLOPs, unless the table says otherwise. Parts that
were settled before are in docs/parts.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
QUIET = "logger=csv evaluation.every=100000 evaluation.images=16 trainer.log_every=50"
TESTBEDS = {
    "linear_gaussian": f"experiment=linear_gaussian {QUIET}",
    "ambiguous": f"experiment=ambiguous {QUIET} trainer.max_steps=1500 batch_size=128 "
    "optimizer.warmup_steps=75",
    "demo": f"experiment=demo {QUIET}",
    "demo_masked": f"experiment=demo {QUIET} data=demo_masked",
    "demo_masked_large": f"experiment=demo_large {QUIET} data=demo_masked",
}
"""Overrides of every run on a testbed."""
PARTLY = "baselines=none solvers=[ab2-8,heun-10] curve=[] samples=0 images=256 drawn_images=0"
"""How a part is scored."""
FULL = "baselines=all solvers=[heun-10,ab2-4,ab2-8,fitted-4,fitted-8] curve=[euler-1,euler-2"
FULL += ",euler-4,euler-8,euler-50,ab2-2,ab2-4,ab2-8,fitted-2,fitted-4,fitted-8] "
FULL += "curve_images=128 sample_images=32 images=256"
"""How the default is scored: beside the baselines, with the curve over network evaluations."""
LARGE = "baselines=none solvers=[heun-10,heun-50,ab2-4,fitted-4] curve=[] samples=4 images=256"
"""How the larger network's samples are scored."""
MAPPED = "baselines=none solvers=[map-1,map-2,map-4,ab2-8,heun-10] curve=[] samples=0 "
MAPPED += "images=256"
"""How a recipe with maps is scored."""
_CHOICES = "images=2048 curve_images=512"
JUDGED = {
    ("ambiguous", FULL): f"{_CHOICES} solvers=[heun-10,heun-50,ab2-4,ab2-8,fitted-4,fitted-8]",
    ("ambiguous", MAPPED): _CHOICES,
    ("linear_gaussian", FULL): "images=1024",
    ("linear_gaussian", MAPPED): "images=1024",
}
"""What scoring of a kind needs beside that on a testbed: images are cheap there, and in `ambiguous`
an image is one choice, so that the shares of a few hundred are further from their weights than a
good sampler's."""


@dataclass(frozen=True)
class Recipe:
    """A recipe and the testbeds that it is tried on."""

    key: str
    what: str
    overrides: str = ""
    """What differs from the default."""
    testbeds: tuple[str, ...] = ("demo", "demo_masked")
    seeds: tuple[int, ...] = SEEDS
    scored: str = PARTLY
    begins_from: Recipe | None = None
    """Whose weights it begins from: `init_from` a run of the same testbed and seed."""


@dataclass(frozen=True)
class Run:
    """One run: a recipe on a testbed with a seed."""

    recipe: Recipe
    testbed: str
    seed: int

    @property
    def name(self) -> str:
        """Its name in the records, and its folder below outputs/results."""
        return f"{self.testbed}/{self.recipe.key}/seed-{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The words after `python -m blip3o_lit.train`."""
        return [
            *TESTBEDS[self.testbed].split(),
            *self.recipe.overrides.split(),
            f"seed={self.seed}",
        ]

    @property
    def first(self) -> Run | None:
        """The run whose weights it begins from."""
        begin = self.recipe.begins_from
        return begin and replace(self, recipe=begin)

    def trainings(self, folder: Path) -> dict[Path, list[str]]:
        """Return the words of its runs by run directory, in their order: `folder` is its own."""
        if self.first is None:
            return {folder: self.overrides}
        begun = folder / "first"
        return {begun: self.first.overrides, folder: [*self.overrides, f"init_from={begun}"]}

    @property
    def evaluation(self) -> list[str]:
        """The words after `python -m blip3o_lit.evaluate ckpt=RUN`."""
        beside = JUDGED.get((self.testbed, self.recipe.scored), "")
        return [*self.recipe.scored.split(), *beside.split()]

    def settings(self) -> dict[str, Any]:
        """Return every key and value that the run is made with."""
        made = {
            "train": _settings("train", tuple(self.overrides)),
            "evaluate": _settings("evaluate", ("ckpt=RUN", *self.evaluation)),
        }
        return made | ({"first": self.first.settings()["train"]} if self.first else {})


@cache
def _settings(command: str, words: tuple[str, ...]) -> dict[str, Any]:
    from blip3o_lit.cli.command import composed
    from blip3o_lit.config.evaluate import EvaluateConfig
    from blip3o_lit.config.train import TrainConfig

    kind = TrainConfig if command == "train" else EvaluateConfig
    return asdict(composed(command, kind, list(words)))


GUESSING = ("demo", "demo_masked")
SHORT = ("linear_gaussian", "ambiguous", *GUESSING)
PLAIN = "flow.cosine_weight=0"
"""The squared error alone: what closed forms hold for, and what parts are compared in."""
DEFAULT = Recipe(
    "default", "default: the plain recipe and a cosine term of weight 1", "", GUESSING, SEEDS, FULL
)
BASE = Recipe(
    "plain", "plain: sample output, half of the draws at t = 0, Muon", PLAIN, SHORT, SEEDS, FULL
)
ON = {testbed: DEFAULT if testbed in GUESSING else BASE for testbed in SHORT}
"""The default on each testbed: experiments with closed forms leave the cosine term out."""
LARGER = Recipe("default", "the default", "", ("demo_masked_large",), SEEDS, LARGE)
TIME_10 = Recipe("time_10", "time embedding of 10 t", f"{PLAIN} model.time_scale=10")
MAPS = {
    testbed: Recipe(
        "maps",
        "maps: half of the draws are pairs of times, from a plain run's weights",
        f"{TIME_10.overrides} flow.pairs=0.5 {shorter}",
        (testbed,),
        SEEDS,
        MAPPED,
        TIME_10,
    )
    for testbed, shorter in {
        "linear_gaussian": "trainer.max_steps=1600 optimizer.lr=1.2e-2",
        "ambiguous": "trainer.max_steps=2000 flow.time_zero_share=0.1",
        "demo_masked": "trainer.max_steps=440 optimizer.lr=4e-3",
    }.items()
}
"""By testbed."""
PARTS = (
    Recipe("share_67", "two thirds at t = 0", f"{PLAIN} flow.time_zero_share=0.67"),
    Recipe(
        "shift", "times shifted by sqrt(tokens x channels / 4096)", f"{PLAIN} flow.time_shift=2.83"
    ),
    TIME_10,
    Recipe(
        "early", "embedding of 10 t, times shifted by 4", f"{TIME_10.overrides} flow.time_shift=4"
    ),
    Recipe(
        "batch_16", "half the steps, of 16 images", f"{PLAIN} batch_size=16 trainer.max_steps=220"
    ),
)
_SEED_PATCH = (
    f"experiment=seed_patch {QUIET} data=demo data.demo.images=1024 model.width=128 model.depth=2 "
    "model.heads=4 model.kv_heads=4 model.mlp_width=384 trainer.max_epochs=null "
    "trainer.max_steps=440 batch_size=8 micro_batch_size=8 optimizer.lr=2e-3 "
    "optimizer.warmup_steps=20 checkpoint.every=100000"
)
_SEED_GRID = (
    f"experiment=seed_grid64 {QUIET} data=demo data.demo.images=1024 mode=patch_only "
    "model.width=128 model.depth=2 model.heads=4 model.kv_heads=4 model.mlp_width=256 "
    "trainer.max_epochs=null trainer.max_steps=440 batch_size=8 optimizer.lr=2e-3 "
    "optimizer.warmup_steps=20 checkpoint.every=100000"
)
_SEED_SCORED = "baselines=none solvers=[euler-50] curve=[] samples=0 images=256 drawn_images=0"
SEED_RECIPES = (
    Recipe("seed_patch", "seed 000: cross-attention, velocity, raw targets", _SEED_PATCH,
           ("demo",), (0,), _SEED_SCORED),
    Recipe("seed_grid64", "seed 001: NextDiT, its schedule, raw targets", _SEED_GRID,
           ("demo",), (0,), _SEED_SCORED),
)  # fmt: skip
GRID = ("1.8e-3", "2.5e-3", "3.5e-3", "5e-3", "7e-3", "1e-2", "1.4e-2", "2e-2", "2.8e-2", "4e-2")
GRID += ("5.6e-2",)
"""Learning rates, a factor of about 1.4 apart."""
RATES_TRIED = {
    "muon": {64: GRID[3:], 128: GRID[3:9], 256: GRID[2:8], 512: GRID[1:9]},
    "adamw": {64: GRID[3:10], 128: GRID[3:8], 256: GRID[1:6], 512: GRID[:4]},
}
"""By optimizer and width: each reaches past its best on both sides."""
RATES = {
    (optimizer, width, rate): Recipe(
        f"width_{width}_rate_{rate}" if optimizer == "muon" else f"adamw_width_{width}_rate_{rate}",
        f"{optimizer}, {width} wide, rate {rate}",
        f"model.width={width} model.heads={width // 32} model.kv_heads={width // 64} "
        f"model.mlp_width={2 * width} trainer.max_steps=120 optimizer={optimizer} "
        f"optimizer.lr={rate}",
        ("demo",),
        (0,),
        "baselines=none solvers=[] curve=[] samples=0 images=256 drawn_images=0",
    )
    for optimizer, tried in RATES_TRIED.items()
    for width, rates in tried.items()
    for rate in rates
}
"""The learning rate over widths, by optimizer, width and rate."""
CLAIMED = (DEFAULT, BASE, *MAPS.values(), LARGER, *SEED_RECIPES)
RECIPES = (*CLAIMED, *RATES.values(), *PARTS)
RUNS = tuple(
    sorted(
        (
            Run(recipe, testbed, seed)
            for recipe in RECIPES
            for testbed in recipe.testbeds
            for seed in recipe.seeds
        ),
        key=lambda run: (run.recipe not in CLAIMED, run.seed),
    )
)
"""In the order of their worth: what the claims rest on, seed by seed."""
