"""Metrics with sum states, float64 and safe under several processes.

Importing this package first imports torchmetrics without its optional companions, whose import for
metrics that nobody here uses takes 40 % of a command's start (7.0 s of CPU time against 4.3 s).
"""

from __future__ import annotations

import importlib
import re
import sys

UNUSED = ("matplotlib", "scipy", "torchvision", "transformers")
"""What torchmetrics imports wherever it is installed."""


def _import_torchmetrics() -> None:
    """Import torchmetrics as if the unused packages were missing; others find them as ever."""
    from lightning_utilities.core import imports

    check = getattr(imports.RequirementCache, "_check_requirement", None)
    available = getattr(imports, "package_available", None)
    if check is None or available is None:
        return  # another version of the library: torchmetrics then imports what it likes

    def checked(self: imports.RequirementCache) -> None:
        check(self)
        named = re.match(r"[\w-]+", self.requirement or "")
        if named and named[0] in UNUSED:
            self.available = False
            self.message = f"{named[0]} is left out by blip3o_lit.metrics"

    imports.RequirementCache._check_requirement = checked
    imports.package_available = lambda name: name not in UNUSED and available(name)
    try:
        importlib.import_module("torchmetrics")
    finally:
        imports.RequirementCache._check_requirement = check
        imports.package_available = available


if "torchmetrics" not in sys.modules:
    _import_torchmetrics()
