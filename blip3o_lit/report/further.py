"""Sections of evaluations that asked for more: samples, times, another run, and all the rest."""

from typing import Any

from blip3o_lit.report import charts
from blip3o_lit.report.record import RunRecord, finite, mapping, mappings
from blip3o_lit.report.scores import ends, estimator
from blip3o_lit.report.tables import facts, table
from blip3o_lit.report.templating import Section

SHOWN = {
    *("format", "split", "images", "mode", "tokens", "checkpoint", "headline", "verdict"),
    *("standing", "verdict_note", "estimators", "baselines", "optimum", "frechet_floor"),
    *("nfe_curve", "position_cosine", "position_std", "retrieval", "zero_shot", "worst"),
    *("examples", "samples", "drawings", "time_bins", "paired", "against", "swapped"),
    *("fitted_solvers", "stores"),
}
"""Blocks of `evaluation.json` that a section of their own shows."""
DIFFERENCE = ("Difference", "95 % from", "95 % to", "p", "Share of wins", "Images")


def against(record: RunRecord) -> Section | None:
    """Return the paired differences to the baselines, and what swapped conditions leave."""
    lines = [
        [f"{estimator(name)} - {baseline}", *_difference(numbers)]
        for name, block in mapping(record.evaluation.get("against")).items()
        for baseline, numbers in mapping(block).items()
    ]
    if not lines:
        return None
    swapped = mapping(record.evaluation.get("swapped"))
    images, pairs = finite(swapped.pop("images", None)), swapped.pop("random_pairs", None)
    left = [[estimator(name), value] for name, value in swapped.items()]
    left = [*left, ["two different true images", pairs]] if finite(pairs) is not None else []
    data = {
        "differences": table(["Cosine of", *DIFFERENCE], lines),
        "swapped": table(["With the condition of another image", "Cosine"], left),
        "images": images,
    }
    return Section("against", "Against the baselines, image by image", data)


def stores(record: RunRecord) -> Section | None:
    """Return the cosine on each store's own images, where a run has several."""
    blocks = {n: mapping(b) for n, b in mapping(record.evaluation.get("stores")).items()}
    found = {name: mapping(block.get("cosine")) for name, block in blocks.items()}
    estimators = list(dict.fromkeys(key for cosines in found.values() for key in cosines))
    if not estimators:
        return None
    lines = [
        [name, block.get("images"), *(found[name].get(key) for key in estimators)]
        for name, block in blocks.items()
    ]
    heads = ["Store", "Images", *(estimator(key) for key in estimators)]
    return Section("stores", "By store", {"numbers": table(heads, lines)})


def samples(record: RunRecord) -> Section | None:
    block = mapping(record.evaluation.get("samples"))
    solver = estimator(str(block.pop("solver", "sample")))
    images = finite(block.pop("images", None))
    lines = [
        [name.replace("_", " "), value, block.get(f"{name}_expected")]
        for name, value in block.items()
        if not name.endswith("_expected")
    ]
    if not lines:
        return None
    heads = ["Several samples per condition", "Measured", "If calibrated"]
    data = {"numbers": table(heads, lines), "solver": solver, "images": images}
    return Section("samples", "Diversity and calibration", data)


def fitted_solvers(record: RunRecord) -> Section | None:
    """Return what solvers were fitted to the flow, beside the usual ones of as many evaluations."""
    lines, images = [], None
    for nfe, block in mapping(record.evaluation.get("fitted_solvers")).items():
        fit = mapping(block)
        images = finite(fit.get("conditions"))
        times = fit.get("times")
        numbers = map(finite, times if isinstance(times, list) else [])
        moments = [f"{number:.3f}" for number in numbers if number is not None]
        chosen = f"Fitted: {fit.get('chosen')}; t = {', '.join(moments)}"
        lines.append([nfe, chosen, fit.get("distance"), fit.get("seconds")])
        usual = {name: finite(value) for name, value in mapping(fit.get("fixed")).items()}
        known = [(value, name) for name, value in usual.items() if value is not None]
        lines += [[nfe, _on_grid(name), value, None] for value, name in sorted(known)]
    if not lines:
        return None
    heads = ["Evaluations", "Solver", "Squared distance", "Seconds to fit"]
    return Section("fitted", "Fitted solvers", {"numbers": table(heads, lines), "images": images})


def times(record: RunRecord) -> Section | None:
    """Return the loss by time bin: `time_bins` is a list of `{"t": [low, high], "loss": x}`."""
    points = []
    for item in mappings(record.evaluation.get("time_bins")):
        times, loss = ends(item.get("t")), finite(item.get("loss"))
        if times is not None and loss is not None:
            points.append([*times, loss])
    if not points:
        return None
    numbers = table(["From t", "To t", "Loss"], points)
    return Section("times", "Loss by time", {"numbers": numbers}, {"times": charts.bars(points)})


def paired(record: RunRecord) -> Section | None:
    block = mapping(record.evaluation.get("paired"))
    lines = [
        [estimator(name), *_difference(numbers)]
        for name, numbers in mapping(block.get("cosine")).items()
    ]
    if not lines:
        return None
    rival = block.get("run", "another run")
    data = {"rival": rival, "differences": table(["Estimator", *DIFFERENCE], lines)}
    return Section("paired", f"Against {rival}", data)


def rest(record: RunRecord) -> Section | None:
    left = {name: value for name, value in record.evaluation.items() if name not in SHOWN}
    return Section("rest", "Other facts", {"facts": facts(left)}) if left else None


def _on_grid(name: str) -> str:
    """Return the label of a solver and its grid: `heun-2, shift 3` -> `Heun, 2 steps, shift 3`."""
    label, comma, grid = name.partition(", ")
    return f"{estimator(label)}{comma}{grid}"


def _difference(numbers: object) -> list[Any]:
    """Return the cells of a paired comparison, in the order of `DIFFERENCE`."""
    block = mapping(numbers)
    low, high = ends(block.get("ci95")) or (None, None)
    others = [block.get(key) for key in ("p_value", "wins", "images")]
    return [block.get("difference"), low, high, *others]
