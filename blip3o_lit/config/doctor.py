"""The schema of the doctor command."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError


@dataclass
class DoctorConfig:
    """Checks the machine and the packages, or a token store."""

    tokens: str | None = None
    """A token store to read whole; left out, the machine is checked."""
    repair: bool = False
    """Write the store's index again from its sound shards, naming what is lost."""

    def __post_init__(self) -> None:
        """Check that there is something to repair."""
        if self.repair and self.tokens is None:
            raise UserError("repair=true needs tokens=DIR, the store to repair")
