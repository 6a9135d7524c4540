"""What the first rank finds out at the start of a run, told to the others.

Hundreds of ranks would read, verify and measure the same at once otherwise. Their process group
does not stand yet: what is said goes over a store like the one by which they will meet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from blip3o_lit.config.errors import LostRank, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


class FirstRank:
    """Does work on the first rank alone and gives what it returns, plain data, to every rank.

    All ranks call the same methods in the same order. A user's mistake is raised on all of them.
    """

    def __init__(
        self, store: Store | None = None, name: str = "", rank: int = 0, world: int | None = None
    ) -> None:
        """Without a store this process is the only one.

        Args:
            store: Where the ranks talk.
            name: Of this run, beside others in the store.
            rank: This rank; 0 is the first.
            world: The number of ranks, where it is known yet.
        """
        self._store, self._name, self._said = store, name, 0
        self.rank = rank
        self.share = (rank, world) if world else (0, 1)
        """Which part of work that is dealt out is this rank's, and the number of parts."""

    @property
    def alone(self) -> bool:
        return self._store is None

    def finds(self, work: Callable[[], Any]) -> Any:
        """Return on every rank what `work` returns on the first."""
        if self._store is None:
            return work()
        self._said += 1
        key = f"{self._name}/{self._said}"
        others = self.share[1] - 1
        if self.rank:
            answer = self._wait_for(key)
            if self._store.add(f"{key}/ranks that heard", 1) == others:
                self._store.set(f"{key}/heard", "{}")
            return _opened(answer)
        try:
            return self._tell(key, work)
        finally:
            # It may end now, and the store with it; where it broke down it has told nothing.
            if others and self._store.check([key]):
                self._wait_for(f"{key}/heard")

    def agree(self, holds: Callable[[], bool]) -> bool:
        """Whether something holds on every rank; where their number is not known, on the first."""
        if self._store is None or self.share[1] == 1:
            return self.finds(holds)
        key, ranks = f"{self._name}/{self._said + 1}", range(self.share[1])
        with suppress(UserError):  # the first rank hears of it and tells all
            self._tell(f"{key}/{self.rank}", holds)
        return self.finds(lambda: all([_opened(self._wait_for(f"{key}/{rank}")) for rank in ranks]))

    def _tell(self, key: str, work: Callable[[], Any]) -> Any:
        assert self._store is not None
        try:
            found = work()
        except UserError as error:
            self._store.set(key, json.dumps({"error": str(error)}))
            raise
        self._store.set(key, json.dumps({"found": found}))
        return found

    def _wait_for(self, key: str) -> dict[str, Any]:
        assert self._store is not None
        try:
            return json.loads(self._store.get(key))
        except RuntimeError as error:  # the connection broke, or nothing came
            reason = str(error).splitlines()[0]
            line = f"another rank ended or did not answer at the start: {reason}"
            raise LostRank(line) from error


def _opened(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["found"]


ALONE = FirstRank()
