"""Metrics with sum states, in float64 and safe under several processes.

The room imports torchmetrics without its optional companions, which would slow every command's
start for metrics that nobody here uses.
"""

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

    def check_used(self: imports.RequirementCache) -> None:
        check(self)
        name = re.match(r"[\w-]+", self.requirement or "")
        if name and name[0] in UNUSED:
            self.available, self.message = False, f"{name[0]} is left out"

    imports.RequirementCache._check_requirement = check_used
    imports.package_available = lambda name: name not in UNUSED and available(name)
    try:
        importlib.import_module("torchmetrics")
    finally:
        imports.RequirementCache._check_requirement = check
        imports.package_available = available


if "torchmetrics" not in sys.modules:
    _import_torchmetrics()
