"""Check the machine or a token store: `python -m blip3o_lit.doctor [tokens=DIR]`."""

import sys
from pathlib import Path

from blip3o_lit.cli.command import run_command
from blip3o_lit.config.commands import DoctorConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.finding import Finding, show, show_table

KEPT = "nothing is left half written: give the same line again"
COMPLETION = 'eval "$(blip3o-train -sc install=bash)"'


def doctor(config: DoctorConfig) -> None:
    """Check, print, and exit with 2 when a check failed."""
    if config.tokens is None:
        from blip3o_lit.inspection.machine import machine_findings

        findings = show(machine_findings(), "this machine")
        print(f"tab completion (bash; zsh, fish alike): {COMPLETION}")
    else:
        findings = _store(config.tokens, config.repair, config.deduplicate)
    counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))
    if counts["fail"]:
        sys.exit(UserError.code)


def _store(tokens: str, repair: bool, deduplicate: bool) -> list[Finding]:
    if "://" in tokens:
        raise UserError(f"tokens={tokens} is remote: doctor reads local folders, copy it first")
    from blip3o_lit.inspection.numbers import HEADER
    from blip3o_lit.inspection.repair import repair as write_again
    from blip3o_lit.inspection.store import inspect

    folder = Path(tokens).expanduser()
    if repair:
        result = write_again(folder)
        kept = f"{result.index.samples:,} samples in {len(result.index.shards)} sound shards"
        done = [Finding("ok", "index.json", f"written again: {kept}")]
        done += [Finding("ok", "found", f"{name} is in the index now") for name in result.unlisted]
        done += [Finding("warn", "lost", line) for line in result.lost]
        show(done, "repair")
    if deduplicate:
        from blip3o_lit.inspection.deduplicate import deduplicate as without_copies

        show([Finding("ok", "deduplicate", str(without_copies(folder)))], "deduplication")
    inspection = inspect(folder)
    show(inspection.findings, str(folder))
    rows = [numbers.row(name) for name, numbers in inspection.numbers.items()]
    show_table("numbers", HEADER, rows)
    return inspection.findings


def main() -> None:
    """Entry point of `blip3o-doctor`; `--repair` is another way to write `repair=true`."""
    sys.argv = ["repair=true" if word == "--repair" else word for word in sys.argv]
    run_command("doctor", DoctorConfig, doctor, KEPT)


if __name__ == "__main__":
    main()
