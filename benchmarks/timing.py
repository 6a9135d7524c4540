"""Side-by-side timing, and the one file that all benchmarks write to."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blip3o_lit.base.files import write_json
from blip3o_lit.training.environment import commit

OUTPUT = Path("outputs") / "bench.json"


def interleaved(
    cases: dict[str, Callable[[], object]],
    rounds: int = 7,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each case.

    Each round runs every case once, in an order that alternates, so that a slow spell of the
    machine hits all of them.

    Args:
        cases: What to run, by name.
        rounds: Timed rounds.
        warm_up: Rounds that are not timed.
        clock: `time.process_time` counts the CPU seconds of this process, on a busy machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        names = list(cases) if number % 2 else list(reversed(cases))
        for name in names:
            started = clock()
            cases[name]()
            if number >= warm_up:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def result(
    name: str, value: float, unit: str, target: float, better: str = "higher"
) -> dict[str, Any]:
    """Return one entry of bench.json; `better` is higher or lower."""
    ok = value >= target if better == "higher" else value <= target
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "target": target,
        "better": better,
        "ok": ok,
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print results as a table."""
    width = max((len(entry["name"]) for entry in results), default=0)
    for entry in results:
        sign = ">=" if entry["better"] == "higher" else "<="
        verdict = "ok" if entry["ok"] else "MISSED"
        print(
            f"{entry['name']:<{width}}  {entry['value']:>10.4g} {entry['unit']:<10} "
            f"target {sign} {entry['target']:g}  {verdict}"
        )


def save(results: list[dict[str, Any]], path: Path = OUTPUT) -> None:
    """Merge results into bench.json: an entry replaces the older one of its name.

    A line a run goes to the history file, with the commit: what was measured when.
    """
    known = json.loads(path.read_text()) if path.is_file() else []
    merged = {entry["name"]: entry for entry in [*known, *results]}
    write_json(path, list(merged.values()))
    values = {entry["name"]: entry["value"] for entry in results}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"time": when, "commit": commit(), "values": values}
    with path.with_name("bench_history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
