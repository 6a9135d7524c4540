"""What makes an Optuna study repeatable: draws by trial and name, and a file that stays whole.

Imports Optuna, so `study.py` imports it late.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial


class TrialSeededSampler(BaseSampler):
    """The tree-structured Parzen estimator, with a generator for each parameter of each trial.

    A value depends on the seed, the trial's number, the parameter's name and the finished trials,
    and not on how many values were drawn before by this process.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        """Keep the seed and the number of random trials."""
        self.seed, self.startup_trials = seed, startup_trials

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return none: parameters are drawn one by one."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return none."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter."""
        words = f"{self.seed} {trial.number} {param_name}".encode()
        seed = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
        sampler = TPESampler(n_startup_trials=self.startup_trials, seed=seed)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class StudyFile(BaseJournalBackend):
    """Optuna's journal as lines of JSON, for one process at a time; the sweep sees to that.

    A line that a power cut left unfinished is cut off when the file is opened again. Optuna's own
    file waits half a minute for the lock of a killed process and can't read past such a line.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        self._logs: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the entries from a number on."""
        yield from self._logs[log_number_from:]

    def append_logs(self, logs: Iterable[dict[str, Any]]) -> None:
        """Add entries and have them on the disk before returning."""
        new = [json.dumps(log, separators=(",", ":")) for log in logs]
        with self.path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in new).encode())
            file.flush()
            os.fsync(file.fileno())
        self._logs += [json.loads(line) for line in new]
