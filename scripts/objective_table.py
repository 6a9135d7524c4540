"""The demo cosine that each option of the objective reaches, as docs/objective.md.

    python scripts/objective_table.py              # every row that is not there yet, then the page
    python scripts/objective_table.py rows=10      # at most ten of them; call again to go on
    python scripts/objective_table.py --print      # the rows and their command lines, run nothing

Each row is a short training run of a small network on the demo tokens and a held-out score. A row
is kept in outputs/objective under a hash of its whole configuration, of the token store and of the
package's version, so a stopped table goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "objective"
PAGE = ROOT / "docs" / "objective.md"
IMAGES = 64
SAMPLER = "heun-5"
BASE = (
    "experiment=demo_large mode=grid_64 model.width=64 model.depth=2 model.heads=4 "
    "model.kv_heads=4 model.mlp_width=128 trainer.max_steps=100 trainer.log_every=50 batch_size=16 "
    "evaluation.every=1000 evaluation.images=16 precision=fp32 logger=csv flow.cosine_weight=0 "
    "model.positions=rope optimizer.muon_layers=blocks"
)
COMMAND = "python -m blip3o_lit.train " + BASE


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    overrides: str = ""
    """Beside those of BASE."""
    start: float = 0.0
    """Time at which the sampler starts."""
    guidance: float = 1.0
    """Guidance scale of the sampler and of the mean."""


NOISE_OUTPUT = "flow.prediction=noise flow.time_zero_share=0 solver=heun"
L2 = "flow.normalise=l2"
SECTIONS: dict[str, list[Row]] = {
    "The default, and how much a seed matters": [
        Row("linear path, sample output"),
        Row("another seed", "seed=1"),
        Row("a third seed", "seed=2"),
    ],
    "Output of the network": [
        Row("velocity", "flow.prediction=velocity"),
        Row("noise (the seeds' epsilon)", NOISE_OUTPUT, start=0.02),
        Row("the same, sampled from later on", NOISE_OUTPUT, start=0.2),
        Row(
            "the same, error of the velocity", f"{NOISE_OUTPUT} flow.weighting=velocity", start=0.2
        ),
    ],
    "Path": [
        Row("trigonometric", "flow=trigonometric"),
        Row("the seeds' linear schedule", "flow=seed_linear"),
        Row("the seeds' cosine schedule", "flow=seed_cosine"),
        Row("noise left at the end", "flow.sigma_min=0.2"),
        Row("less extra noise", "flow=seed_linear flow.sigma_max=0.3"),
    ],
    "Scales, all undone in sampling": [
        Row("target of the loss", "flow.velocity_scale=0.1"),
        Row("output of the network", "flow.output_scale=0.1"),
        Row("both, as the patch seed", "flow.velocity_scale=0.1 flow.output_scale=0.1"),
        Row("adaptive", "flow.adaptive_scale=true flow.output_scale=0.1"),
        Row("target tokens", "flow.target_norm_scale=3"),
        Row("tokens as they are stored", "data.scale=raw"),
        Row("the same, noise of their size", "data.scale=raw flow.adaptive_noise=true"),
        Row("unit-norm targets: the norm is lost", L2),
        Row("the same, noise of their size", f"{L2} flow.adaptive_noise=true"),
        Row("on a sphere", f"{L2} flow=trigonometric flow.target_norm_scale=8"),
    ],
    "Training times and their weight": [
        Row("no draws at t = 0", "flow.time_zero_share=0"),
        Row("noise as input there, not zeros", "flow.time_zero_input=noise"),
        Row("U-shaped", "flow.time=u_shaped"),
        Row("logit-normal", "flow.time=logit_normal flow.time_mean=-0.5 flow.time_std=1.2"),
        Row("shifted towards noise", "flow.time_shift=3"),
        Row("error of the velocity", "flow.weighting=velocity"),
        Row("error of the sample", "flow.prediction=velocity flow.weighting=sample"),
    ],
    "Further terms of the loss": [
        Row("cosine of the tokens", "flow.cosine_weight=0.5"),
        Row("cosine of their mean (global alignment)", "flow.consistency_weight=0.5"),
        Row("error of the estimate", "flow.prediction=velocity flow.semantic_weight=0.5"),
        Row("the same, late times only", "flow.cosine_weight=0.5 flow.auxiliary_from=0.5"),
        Row("contrastive over an image's tokens", "flow.contrastive_weight=0.1"),
        Row("norm of the output", "flow.regularization_weight=0.05"),
    ],
    "The CLS token (257 raw tokens: these rows compare with each other alone)": [
        Row("CLS and patches", "mode=cls_patch"),
        Row("the CLS token counts 16 times", "mode=cls_patch flow.cls_weight=16"),
    ],
    "Guidance": [
        Row("condition dropped, no guidance", "flow.condition_dropout=0.1"),
        Row("guidance 1.5", "flow.condition_dropout=0.1", guidance=1.5),
    ],
}
ROWS = [row for rows in SECTIONS.values() for row in rows]


def store_hash() -> str:
    """Return the content hash of the demo's token store, which is built if it is missing."""
    from blip3o_lit.extraction.demo import demo_store
    from blip3o_lit.tokens.store.index import TokenIndex

    return TokenIndex.load(demo_store()).hash


def overrides(row: Row) -> list[str]:
    """Return the words after `python -m blip3o_lit.train`."""
    words = [*BASE.split(), *row.overrides.split()]
    return words + [f"solver.start={row.start}"] * (row.start > 0)


def place(row: Row, tokens: str) -> Path:
    """Return where a row's result is kept."""
    from blip3o_lit import __version__
    from blip3o_lit.cli.command import composed
    from blip3o_lit.config.train import TrainConfig

    config = asdict(composed("train", TrainConfig, overrides(row)))
    key = json.dumps([__version__, config, tokens, row.start, row.guidance, SAMPLER, IMAGES])
    return FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def measure(row: Row, tokens: str) -> dict[str, Any]:
    """Train a row's network and score it on held-out scenes."""
    from blip3o_lit import BLIP3oInference
    from blip3o_lit.cli.command import composed
    from blip3o_lit.config.solver import SolverConfig
    from blip3o_lit.config.train import TrainConfig
    from blip3o_lit.training.run import run_training

    config = composed("train", TrainConfig, overrides(row))
    folder = FOLDER / f".{place(row, tokens).stem}"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        run_training(config, folder, overrides(row))
        model = BLIP3oInference(folder / "checkpoints" / "last.ckpt", "cpu")
        steps = int(SAMPLER.partition("-")[2])
        sampler = SolverConfig.named(
            "heun", steps=steps, start=row.start, guidance_scale=row.guidance
        )
        mean = SolverConfig(guidance_scale=row.guidance) if config.flow.has_mean else None
        found = {
            "mean": scores(model, mean) if mean else None,
            "sample": scores(model, sampler),
            "seconds": round(time.perf_counter() - started, 1),
        }
    shutil.rmtree(folder)
    return found


def scores(model: Any, solver: Any) -> dict[str, float]:
    """Return cosine and norm ratio of held-out scenes by one estimator."""
    from blip3o_lit.metrics.cosine import TokenScores

    metric = TokenScores(model.translator.target_standardizer.mean_NC, model.shape.target)
    for batch in model.generate_from_dataset(limit=IMAGES, solver=solver):
        metric.update(batch["generated"], batch["target"].float())
    found = metric.compute()
    return {name: round(float(found[name]), 5) for name in ("cosine", "norm_ratio")}


def baseline() -> float:
    """Return the held-out cosine of the mean token of each position: what a constant scores."""
    import numpy as np
    import torch

    from blip3o_lit.config.mode import ModeConfig
    from blip3o_lit.extraction.demo import demo_store
    from blip3o_lit.tokens.reading.reader import TokenReader
    from blip3o_lit.tokens.reading.token_store import TokenStore

    store, mode = TokenStore.open(demo_store()), ModeConfig("grid_64", True)
    train, held = (TokenReader(store, split, mode=mode) for split in ("train", "validation"))
    mean_ND = train.read(np.arange(len(train)))["target"].float().mean(0)
    true_BND = held.read(np.arange(IMAGES))["target"].float()
    return float(torch.cosine_similarity(mean_ND.expand_as(true_BND), true_BND, dim=-1).mean())


def page(results: list[dict[str, Any]], tokens: str) -> str:
    """Return docs/objective.md."""
    first = [results[ROWS.index(row)]["sample"]["cosine"] for row in ROWS[:3]]
    lines = [
        "# What each option of the objective reaches on the demo",
        "",
        "One short run an option, so that none is decoration: the same small network, the same",
        f"{IMAGES} held-out scenes. Written by",
        "",
        "```bash",
        "python scripts/objective_table.py",
        "```",
        "",
        "which may be stopped and called again. Each row is this command line with the row's",
        "overrides added:",
        "",
        "```bash",
        *wrapped(COMMAND),
        "```",
        "",
        f"Cosines of generated tokens, raw, held-out; mean: one evaluation, sample: {SAMPLER},",
        "norm: the mean length of sampled tokens over that of the true ones. The mean token of",
        f"each position, a constant, has a cosine of {baseline():.4f}. Three seeds of the default",
        f"lie within {max(first) - min(first):.4f} (sample): smaller differences say nothing, and",
        "100 steps are too few to rank what is close. A noise output has no posterior mean in one",
        "evaluation. The cosine term of the default is left out, so that each row is one change to",
        f"the squared error. Token store {tokens[:12]}.",
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", "| option | overrides | mean | sample | norm |"]
        lines += ["|---|---|---|---|---|"]
        for row in rows:
            result = results[ROWS.index(row)]
            mean, sample = result["mean"], result["sample"]
            words = [f"`{word}`" for word in row.overrides.split()]
            words += [f"`solver.guidance_scale={row.guidance}`"] * (row.guidance != 1)
            words += [f"`solver.start={row.start}`"] * (row.start > 0)
            cells = [
                row.what,
                " ".join(words) or "-",
                f"{mean['cosine']:.4f}" if mean else "none",
                f"{sample['cosine']:.4f}",
                f"{sample['norm_ratio']:.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def wrapped(command: str, width: int = 96) -> list[str]:
    """Return a command line over several lines."""
    lines = [""]
    for word in command.split():
        if len(lines[-1]) + len(word) > width:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {word}" if lines[-1].strip() else ("  " * (len(lines) > 1)) + word
    return lines


def main(words: list[str]) -> int:
    """Run what is missing, write the page when every row is there."""
    if "--print" in words:
        for row in ROWS:
            print(f"{row.what}\n  {COMMAND} {row.overrides}")
        return 0
    from blip3o_lit.base.files import write_json

    most = next((int(word[5:]) for word in words if word.startswith("rows=")), len(ROWS))
    tokens = store_hash()
    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [row for row in ROWS if not place(row, tokens).is_file()]
    print(f"{len(ROWS)} rows, {len(missing)} to run", flush=True)
    for row in missing[:most]:
        result = measure(row, tokens)
        file = place(row, tokens)
        write_json(file, result)
        mean = result["mean"]["cosine"] if result["mean"] else "-"
        print(
            f"{row.what:<40} mean {mean} sample {result['sample']['cosine']} "
            f"norm {result['sample']['norm_ratio']} ({result['seconds']} s)",
            flush=True,
        )
    if len(missing) > most:
        print(f"{len(missing) - most} rows are left: call again")
        return 0
    results = [json.loads(place(row, tokens).read_text("utf-8")) for row in ROWS]
    PAGE.write_text(page(results, tokens), "utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
