"""The runs behind docs/results.md: testbeds, recipes, seeds, as command-line overrides.

Networks are small and runs short, so that all of it fits into 100 minutes on 2 CPU cores; the
default is confirmed at the demo's own size. Within a testbed every recipe has the same tokens,
images and steps, hence the same network FLOPs, unless the table says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)
"""Of the default: with three the 95 % interval is 4.3 standard errors wide on each side."""
SMALL = "model.width=128 model.depth=3 model.heads=4 model.kv_heads=4 model.mlp_width=256"
QUIET = "logger=csv evaluation.every=100000 evaluation.images=16 trainer.log_every=50"
TESTBEDS = {
    "linear_gaussian": f"experiment=linear_gaussian {QUIET}",
    "demo": f"experiment=demo_large {QUIET} {SMALL} trainer.max_steps=300 batch_size=16",
    "demo_masked": f"experiment=demo_large {QUIET} {SMALL} data=demo_masked trainer.max_steps=300 "
    "batch_size=16",
    "demo_size": f"experiment=demo_large {QUIET}",
    "demo_masked_size": f"experiment=demo_large {QUIET} data=demo_masked",
    "ambiguous": f"experiment=ambiguous {QUIET} trainer.max_steps=1500 batch_size=128 "
    "optimizer.warmup_steps=75",
}
"""Overrides of every run on a testbed."""
SCORED = "baselines=none solvers=[ab2-8] curve=[] samples=0 images=256"
"""How a part is scored."""
FULL = "baselines=all solvers=[euler-4,ab2-4,ab2-8,heun-10,fitted-4,fitted-8] curve=[euler-1"
FULL += ",euler-2,euler-4,euler-8,euler-50,ab2-2,ab2-4,ab2-8,fitted-2,fitted-4,fitted-8] "
FULL += "curve_images=256 sample_images=64 images=256"
"""How the default is scored: beside the baselines, with the curve over network evaluations."""
CONFIRMED = "baselines=all solvers=[ab2-4,ab2-8,heun-10] curve=[] samples=0 images=512"
"""How the default is scored at its preset's size, on 512 held-out images."""
GUESSED = "baselines=none solvers=[ab2-4,ab2-8,heun-10] curve=[] samples=0 images=256"
"""The same where the target must be guessed."""
MAPPED = "baselines=none solvers=[ab2-8,map-1,map-2,map-4,heun-10,heun-50] curve=[] samples=0 "
MAPPED += "images=512"
"""How a recipe with maps is scored."""
JUDGED = {"ambiguous": "images=2048"}
"""What scoring needs beside that on a testbed: there an image is one choice, and the shares of a
few hundred choices are further from their weights than a good sampler's."""
NO_MEAN = "flow.time_zero_share=0"


@dataclass(frozen=True)
class Recipe:
    """A recipe and the testbeds that it is tried on."""

    key: str
    what: str
    overrides: str = ""
    """What differs from the default."""
    testbeds: tuple[str, ...] = ("linear_gaussian", "demo")
    seeds: tuple[int, ...] = SEEDS
    scored: str = SCORED


@dataclass(frozen=True)
class Run:
    """One run: a recipe on a testbed with a seed."""

    recipe: Recipe
    testbed: str
    seed: int

    @property
    def name(self) -> str:
        """Where it stands below outputs/results."""
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
    def evaluation(self) -> list[str]:
        """The words after `python -m blip3o_lit.evaluate ckpt=RUN`."""
        return [*self.recipe.scored.split(), *JUDGED.get(self.testbed, "").split()]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a result to count as this run's: all of its configuration."""
        from blip3o_lit import __version__
        from blip3o_lit.cli.command import composed
        from blip3o_lit.config.evaluate import EvaluateConfig
        from blip3o_lit.config.train import TrainConfig

        return {
            "train": asdict(composed("train", TrainConfig, self.overrides)),
            "evaluate": asdict(
                composed("evaluate", EvaluateConfig, ["ckpt=RUN", *self.evaluation])
            ),
            "version": __version__,
        }


SHORT = ("linear_gaussian", "demo", "demo_masked", "ambiguous")
REAL = ("demo",)
GUESSING = ("demo", "demo_masked")
UNSURE = ("linear_gaussian", "demo", "demo_masked")
"""Where a part is tried that was close to becoming the default."""
PLAIN = "flow.cosine_weight=0"
"""The squared error alone: what closed forms hold for, and what parts are compared in."""
DEFAULT = Recipe(
    "with_cosine", "default: the plain recipe and a cosine term of weight 1", "", GUESSING,
    MORE_SEEDS, FULL,
)  # fmt: skip
BASE = Recipe(
    "default", "plain: sample output, half of the draws at t = 0, Muon", PLAIN, SHORT, SEEDS, FULL
)
ON = {testbed: DEFAULT if testbed in GUESSING else BASE for testbed in SHORT}
"""The default on each testbed: experiments with closed forms leave the cosine term out."""
CONFIRMED_DEMO = Recipe("with_cosine", "the default at the demo's size", "", ("demo_size",), (0,),
                        CONFIRMED)  # fmt: skip
CONFIRMED_MASKED = Recipe("with_cosine", "the default at the demo's size", "",
                          ("demo_masked_size",), SEEDS, GUESSED)  # fmt: skip
PLAIN_DEMO = Recipe("confirmed", "plain, at the demo's size", PLAIN, ("demo_size",), (0,),
                    CONFIRMED)  # fmt: skip
PLAIN_MASKED = Recipe("guessed", "plain, at the demo's size", PLAIN, ("demo_masked_size",), SEEDS,
                      GUESSED)  # fmt: skip


def _part(key: str, what: str, overrides: str, testbeds: tuple[str, ...] = UNSURE[:2]) -> Recipe:
    """Return a part of the recipe, tried beside the squared error alone."""
    return Recipe(key, what, f"{PLAIN} {overrides}", testbeds)


PARTS = (
    _part("velocity", "velocity output", "flow.prediction=velocity"),
    _part("noise", "noise output",
          f"flow.prediction=noise {NO_MEAN} solver=heun solver.start=0.2"),
    _part("noise_at_zero", "noise, not zeros, as input at t = 0", "flow.time_zero_input=noise"),
    _part("share_0", "no draws at t = 0", NO_MEAN),
    _part("share_8", "an eighth at t = 0", "flow.time_zero_share=0.125"),
    _part("share_4", "a quarter at t = 0", "flow.time_zero_share=0.25"),
    _part("share_67", "two thirds at t = 0", "flow.time_zero_share=0.67", UNSURE),
    _part("adamw", "AdamW on all matrices", "optimizer=adamw"),
    _part("adamw_slower", "the same, lower learning rate", "optimizer=adamw optimizer.lr=4e-3",
          REAL),
    _part("u_shaped", "U-shaped times", "flow.time=u_shaped"),
    _part("logit_normal", "logit-normal times", "flow.time=logit_normal"),
    _part("shift_3", "times shifted towards noise by 3", "flow.time_shift=3"),
    _part("time_10", "time embedding of 10 t", "model.time_scale=10", UNSURE),
    Recipe("cosine", "cosine term of weight 0.1", "flow.cosine_weight=0.1"),
    Recipe("cosine_1", "cosine term of weight 1", "flow.cosine_weight=1.0", UNSURE),
    _part("raw", "tokens as stored, not standardised", "data.scale=raw"),
    _part("ema_99", "weight average over 100 steps", "optimizer.ema_decay=0.99"),
    _part("cls", "with the CLS token", "mode=cls_patch", REAL),
    _part("cls_16", "with the CLS token, which counts 16 times",
          "mode=cls_patch flow.cls_weight=16", REAL),
    _part("cross", "cross-attention, rotated keys", "model.conditioning=cross", REAL),
    _part("dropout", "guidance training: condition dropped in a tenth",
          "flow.condition_dropout=0.1", REAL),
)  # fmt: skip
MAPS = Recipe("maps", "maps: half of the draws are pairs of times",
              f"{PLAIN} flow.pairs=0.5 model.time_scale=10",
              ("linear_gaussian", "demo_masked", "ambiguous"), SEEDS, MAPPED)  # fmt: skip
_SEED_PATCH = (
    f"experiment=seed_patch {QUIET} {SMALL} data=demo model.mlp_width=384 trainer.max_epochs=null "
    "trainer.max_steps=300 batch_size=16 micro_batch_size=16 optimizer.lr=2e-3 "
    "optimizer.warmup_steps=20 checkpoint.every=100000"
)
_SEED_GRID = (
    f"experiment=seed_grid64 {QUIET} data=demo mode=patch_only model.width=128 model.depth=3 "
    "model.heads=4 model.kv_heads=4 model.mlp_width=256 trainer.max_epochs=null "
    "trainer.max_steps=300 batch_size=16 optimizer.lr=2e-3 optimizer.warmup_steps=20 "
    "checkpoint.every=100000"
)
SEED_SCORED = "baselines=none solvers=[euler-50] curve=[] samples=0 images=256"
SEED_RECIPES = (
    Recipe("seed_patch", "seed 000: cross-attention, velocity, raw targets", _SEED_PATCH, REAL,
           SEEDS, SEED_SCORED),
    Recipe("seed_grid64", "seed 001: NextDiT, its schedule, raw targets", _SEED_GRID, REAL, SEEDS,
           SEED_SCORED),
)  # fmt: skip
WIDTHS = tuple(
    Recipe(
        f"width_{width}_{output}",
        f"{output} output, {width} wide",
        f"{PLAIN} flow.prediction={output} model.width={width} model.heads={width // 32} "
        f"model.kv_heads={width // 32} model.mlp_width={2 * width}",
        REAL,
        (0,),
    )
    for width in (64, 128, 256)
    for output in ("sample", "velocity")
    if width != 128  # the plain recipe and the velocity row are 128 wide, the target's own width
)
CLAIMED = (
    DEFAULT,
    BASE,
    MAPS,
    *SEED_RECIPES,
    CONFIRMED_DEMO,
    CONFIRMED_MASKED,
    PLAIN_DEMO,
    PLAIN_MASKED,
)
RECIPES = (*CLAIMED, *PARTS, *WIDTHS)
RUNS = tuple(
    sorted(
        (
            Run(recipe, testbed, seed)
            for recipe in RECIPES
            for testbed in recipe.testbeds
            for seed in recipe.seeds
        ),
        key=lambda run: (run.recipe not in CLAIMED, run.seed, run.testbed != "demo"),
    )
)
"""In the order of their worth: what the claims rest on, then seed by seed the demo first."""
