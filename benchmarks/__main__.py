"""Run the benchmarks, print a table and merge it into outputs/bench.json."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks
from benchmarks.timing import save, show


def main() -> int:
    """Run all benchmarks, or the one that ONLY names; 2 when there is no such benchmark."""
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    only = options.get("ONLY", "")
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    if only and only not in names:
        print(f"ONLY={only} is no benchmark: choose from {', '.join(names)}", file=sys.stderr)
        return 2
    for name in [only] if only else names:
        if name == "__main__":
            continue
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "run"):
            print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
            results = module.run()
            if results:
                show(results)
                save(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
