"""Held-out evaluation with baselines: `python -m blip3o_lit.evaluate ckpt=outputs/train/RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_lit.base.files import write_json
from blip3o_lit.base.home import fits
from blip3o_lit.base.words import changes, pasteable
from blip3o_lit.cli.command import run_command
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import OWN, EvaluateConfig

if TYPE_CHECKING:
    from blip3o_lit.checkpoints.load import Loaded
    from blip3o_lit.tokens.reading.reader import TokenReader


KEPT = "no score was written, fitted baselines are kept: give the same line again"
COLUMNS = {
    "cosine": "cosine",
    "cosine_centred": "centred",
    "mse": "mse",
    "r2": "r2",
    "norm_ratio": "norm",
    "frechet": "frechet",
}
"""Score -> heading of the closing table, which fits 80 columns."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score one checkpoint; write evaluation.json and report.html; return the former's content."""
    from blip3o_lit.base.progress import phases
    from blip3o_lit.base.units import human_time
    from blip3o_lit.budget.out_of_memory import batch_limit
    from blip3o_lit.checkpoints.load import best_device, load, load_averages
    from blip3o_lit.checkpoints.solvers import save_solvers
    from blip3o_lit.checkpoints.weights import find_weights
    from blip3o_lit.drawing.drawer import save_readout
    from blip3o_lit.evaluation.forecast import phase_seconds
    from blip3o_lit.evaluation.readers import open_readers
    from blip3o_lit.evaluation.score import Scorer
    from blip3o_lit.report.page import write_report
    from blip3o_lit.translation.cuda_graphs import Graphs

    if not config.out and not Path(config.ckpt).expanduser().exists():
        find_weights(config.ckpt)  # says what is wrong, unless it is a model of the hub
        raise UserError(f"{config.ckpt} is a model of the hub: say where to write with out=DIR")
    device = best_device() if config.device == "auto" else config.device
    loaded = load(config.ckpt, device)
    stored = loaded.translator.fitted
    folder = Path(config.out) if config.out else loaded.folder
    held, train = open_readers(loaded, config)
    check_held_out(loaded, held, train, config)
    rival = load(config.vs, device) if config.vs else None
    if rival is not None and not rival.shape.fits(loaded.shape):
        raise UserError(f"vs={config.vs} translates other token shapes than ckpt={config.ckpt}")
    for one in (loaded, rival) if config.graphs else ():
        if one is not None:
            one.translator.graphs = Graphs(one.device)
    averages = load_averages(loaded, config.ema) if config.ema else {}
    with phases() as report, batch_limit("batch_size", config.batch_size):
        scorer = Scorer(loaded, held, train, config, fits(), report, rival, averages)
        seconds = phase_seconds(scorer)
        parts = ", ".join(f"{name} {human_time(time)}" for name, time in seconds.items())
        whole = human_time(sum(seconds.values()))
        print(f"about {whole} on this machine, by a measured batch: {parts}")
        result = scorer.run()
    result["ckpt"] = config.ckpt
    result["overrides"] = list(changes(config, EvaluateConfig(config.ckpt)))
    for nfe, record in result.get("fitted_solvers", {}).items():
        print(f"fitted-{nfe}: {record['chosen']}, {record['seconds']:.0f} s to fit")
    write_json(folder / "evaluation.json", result)
    readout = scorer.drawings.readout
    if readout is not None and folder == loaded.folder and result["trained_on_these"]:
        save_readout(readout, folder)
    fitted = loaded.translator.fitted
    if fitted is not stored and folder == loaded.folder and result["trained_on_these"]:
        save_solvers(fitted, scorer.content, folder)
    page = write_report(folder)
    show(result)
    show_averages(result)
    print(f"evaluation: {folder / 'evaluation.json'}\nreport: {page}")
    words = [pasteable("ckpt", loaded.file), pasteable("out", folder / "export")]
    if folder == loaded.folder and result.get("averages", {}).get("best", OWN) != OWN:
        words.append("ema=best")
    print("next: python -m blip3o_lit.export", *words)
    return result


def check_held_out(
    loaded: Loaded, held: TokenReader, train: TokenReader | None, config: EvaluateConfig
) -> None:
    """Refuse to score as held out what the run was trained on, in another store of its pictures."""
    from blip3o_lit.evaluation.readers import trained_images

    same = train is not None and train.content_hash == loaded.facts["tokens"]["hash"]
    if same or config.same_data or config.split == "train" or not config.data.tokens:
        return
    count = trained_images(loaded, held)
    own = loaded.facts["tokens"]["path"]
    if count is None:
        print(f"not known: which of these images the run was trained on ({own} is not here)")
    elif count:
        raise UserError(
            f"data.tokens={config.data.tokens}: the run was trained on {count} or more of its "
            f"{len(held)} {config.split} images (in {own}): give both stores one split, by "
            "split.file or the same split.seed, or add same_data=true"
        )


def show(result: dict[str, Any]) -> None:
    """Print estimators and baselines, best cosine first, and where the headline stands."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['images']} {result['split']} images, mode {result['mode']}"
    own = [name for name in result.get("metrics", []) if name not in COLUMNS]
    table = Table("", "nfe", *COLUMNS.values(), *own, title=title)
    rows = {**result["estimators"], **result["baselines"]}
    rows |= {f"closed form {name}": scores for name, scores in result.get("optimum", {}).items()}
    for name, scores in sorted(rows.items(), key=lambda item: -item[1]["cosine"]):
        if scores["images"] != result["images"]:
            name = f"{name} ({scores['images']} images)"
        cells = [scores.get(column) for column in (*COLUMNS, *own)]
        numbers = ["" if cell is None else f"{cell:.4g}" for cell in cells]
        table.add_row(name, str(scores.get("nfe", "")), *numbers)
    console = Console()
    console.print(table)
    for name, paired in result.get("paired", {}).get("cosine", {}).items():
        low, high = paired["ci95"]
        console.print(
            f"{name} against {result['paired']['run']}: {paired['difference']:+.5f} "
            f"({low:+.5f} to {high:+.5f}), p = {paired['p_value']:.2g}, "
            f"better on {100 * paired['wins']:.0f} % of images",
            highlight=False,
        )
    if result.get("left_out"):
        names = ", ".join(result["left_out"])
        console.print(f"left out: {names}, which read a grid; this condition is words alone")
    console.print(
        f"{result['standing']}: {result['verdict_note']}", highlight=False, soft_wrap=True
    )


def show_averages(result: dict[str, Any]) -> None:
    """Print a line for each average of the run's weights, and which is best."""
    averages = result.get("averages")
    if averages is None:
        return
    for name, scores in averages["scores"].items():
        width = "the run's own average" if name == OWN else f"ema {name}"
        missed = f", {scores['missed']:.1%} of its profile missed" if "missed" in scores else ""
        print(f"{width}: {result['headline']} cosine {scores['cosine']:.5f}{missed}")
    best = averages["best"]
    which = "the run's own average" if best == OWN else f"ema {best}"
    print(f"best: {which}")


def main() -> None:
    run_command("evaluate", EvaluateConfig, evaluate, KEPT)


if __name__ == "__main__":
    main()
