"""Run the benchmarks, print a table and merge it into outputs/bench.json."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import save, show


def main() -> int:
    """Run all benchmarks, each in a process of its own, or the one that ONLY names here.

    Returns:
        2 when there is no such benchmark, 1 when one of them could not be run to its end.
    """
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    only = options.get("ONLY", "")
    files = sorted(Path(__file__).parent.glob("*.py"))
    names = [file.stem for file in files if "\ndef run(" in file.read_text("utf-8")]
    if only and only not in names:
        print(f"ONLY={only} is no benchmark: choose from {', '.join(names)}", file=sys.stderr)
        return 2
    if not only:
        commands = ([sys.executable, "-m", "benchmarks", f"ONLY={name}"] for name in names)
        broken = sum(subprocess.run(command, check=False).returncode != 0 for command in commands)
        return int(broken > 0)
    module = importlib.import_module(f"benchmarks.{only}")
    print(f"\n{only}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
    results = module.run()
    if results:
        show(results)
        save(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
