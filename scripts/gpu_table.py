"""Writes what scripts/check_gpu.sh measured into docs/performance.md, as tables.

    python scripts/gpu_table.py outputs/gpu/gpu.json

It prints them too. The page keeps one card's figures: those of the last call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- from gpu.json -->\n", "<!-- until here -->\n"
NETWORKS = ("base", "large", "nextdit")
TARGETS = {"base": 0.4, "nextdit": 0.5}
"""Least MFU of compiled training; of extraction, the share of the bare towers' speed is next."""
EXTRACTION = 0.95
CHECKS = ("losses", "samples", "graphs", "scores", "resume", "ranks")


def rows(title: list[str], lines: list[list[str]]) -> str:
    """Return a table, or nothing where it has no lines."""
    table = [title, ["---"] * len(title), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table) + "\n" if lines else ""


def against(value: float, least: float | None) -> str:
    """Return a share beside its target."""
    if least is None:
        return f"{value:.2f}"
    return (
        f"{value:.2f} (>= {least:.2f})" if value >= least else f"**{value:.2f}** (>= {least:.2f})"
    )


def tables(found: dict[str, Any]) -> str:
    """Return what one gpu.json says."""
    machine = found["machine"]
    toy = ", toy sizes: it tests the script and nothing else" if machine["small"] else ""
    text = f"{machine['devices']} x {machine['device']}, torch {machine['torch']}{toy}.\n\n"
    if found["failed"]:
        text += f"**Failed or not reached: {', '.join(found['failed'])}.**\n\n"
    worst = [
        [name, f"{max(found[name].values()):.1e}", max(found[name], key=found[name].get)]
        for name in CHECKS
        if found.get(name)
    ]
    text += rows(["held against the CPU", "largest difference", "of"], worst)
    trained = []
    for name in NETWORKS:
        for kind in ("eager", "compiled", "combined"):
            run = found.get(f"{name}_{kind}")
            least = TARGETS.get(name) if kind == "compiled" and not machine["small"] else None
            if run:
                trained.append(
                    [
                        f"{name}, {kind}",
                        str(run["batch"]),
                        f"{run['images_per_s']:.1f}",
                        against(run["mfu"], least),
                        f"{run['memory_gib']:.1f}",
                        f"{run['needed_gb_per_s']:.2f}",
                    ]
                )
    text += rows(["`train`", "batch", "images/s", "MFU", "GiB", "reads, GB/s"], trained)
    lines = []
    if towers := found.get("extraction"):
        share = against(towers["engine"] / towers["bare"], None if machine["small"] else EXTRACTION)
        speed = (
            f"{towers['engine']:.1f} images/s, of the bare towers' {towers['bare']:.1f}: {share}"
        )
        lines.append(["extraction, EVA-CLIP-8B", speed])
    for images, speeds in found.get("samplers", {}).items():
        words = ", ".join(f"{name} {speed:.1f} images/s" for name, speed in speeds.items())
        lines.append([f"`base`, heun-10, batch {images}", words])
    return text + rows(["", ""], lines)


def main() -> None:
    text = tables(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    page = PAGE.read_text("utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}", "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
