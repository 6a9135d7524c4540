"""metrics.csv: one row a logged step, appended and never lost, also over a resumed run."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from blip3o_lit.base.files import replacing


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv, or none when it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class MetricsCsv(Logger):
    """Writes `metrics.csv` into a run directory.

    A new column makes the file be rewritten (through a temporary name); otherwise rows are
    appended and flushed, so that a killed run keeps them.
    """

    def __init__(self, run_dir: Path, resumed_from: Path | None = None, step: int = 0) -> None:
        """Start the file; a resumed run keeps the earlier rows up to the step it goes on from.

        Args:
            run_dir: Where metrics.csv goes.
            resumed_from: Run directory of the checkpoint that is resumed.
            step: Its step; later rows are dropped, since they will be written again.
        """
        super().__init__()
        self.path = run_dir / "metrics.csv"
        earlier = read_rows(resumed_from / "metrics.csv") if resumed_from else []
        self._rows: list[dict[str, Any]] = [row for row in earlier if int(row["step"]) <= step]
        self._columns: list[str] = ["step"]
        for row in self._rows:
            self._add_columns(row)
        self._rewrite()

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version; a run directory has one."""
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the run directory has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row, or add to the last row when it is of the same step."""
        values = {key: f"{float(value):.8g}" for key, value in metrics.items() if key != "epoch"}
        row: dict[str, Any] = {"step": str(step or 0), **values}
        known = len(self._columns)
        self._add_columns(row)
        if self._rows and str(self._rows[-1]["step"]) == row["step"]:
            self._rows[-1].update(row)
            self._rewrite()
            return
        self._rows.append(row)
        if len(self._columns) > known:
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _add_columns(self, row: Mapping[str, Any]) -> None:
        self._columns += [key for key in row if key not in self._columns]

    @rank_zero_only
    def _rewrite(self) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
