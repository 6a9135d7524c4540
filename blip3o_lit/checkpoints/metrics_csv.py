"""metrics.csv: one row per logged step, appended and never lost, also over a resumed run."""

import csv
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

    A resumed run keeps the rows of `resumed_from`, the run directory of its checkpoint, up to the
    checkpoint's step: later ones will be written again. A new column makes the file be rewritten
    (through a temporary name); otherwise rows are appended, so that a killed run keeps them.
    """

    def __init__(self, run_dir: Path, resumed_from: Path | None = None, step: int = 0) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        earlier = read_rows(resumed_from / "metrics.csv") if resumed_from else []
        self._rows = [row for row in earlier if int(row["step"]) <= step]
        self._columns = list(self._rows[0]) if self._rows else ["step"]
        self._rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run directory has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row, or add to the last row when it is of the same step."""
        values = {key: f"{float(value):.8g}" for key, value in metrics.items() if key != "epoch"}
        row = {"step": str(step or 0), **values}
        new_columns = [key for key in row if key not in self._columns]
        self._columns += new_columns
        same_step = bool(self._rows) and self._rows[-1]["step"] == row["step"]
        if same_step:
            self._rows[-1].update(row)
        else:
            self._rows.append(row)
        if same_step or new_columns:
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    @rank_zero_only
    def _rewrite(self) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
