"""What doctor finds, and how it says so: a table on a terminal, plain lines elsewhere."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One checked thing."""

    level: str
    """ok, warn or fail."""
    what: str
    """What was checked, in a word or two."""
    says: str
    """What was found."""
    fix: str = ""
    """What to do about it; empty where all is well."""

    def __str__(self) -> str:
        fix = f" -> {self.fix}" if self.fix else ""
        return f"{self.level:<4}  {self.what}: {self.says}{fix}"


def show(findings: Iterable[Finding], title: str) -> list[Finding]:
    """Print findings, off a terminal as they come, and return them."""
    console = Console()
    shown = []
    if not console.is_terminal:
        for finding in findings:
            print(finding, flush=True)
            shown.append(finding)
        return shown
    table = Table("", "check", "found", "fix", title=title, title_justify="left", box=None)
    with console.status(f"checking {title}"):
        for finding in findings:
            level = Text(finding.level, style=COLOURS[finding.level])
            table.add_row(level, finding.what, Text(finding.says), Text(finding.fix))
            shown.append(finding)
    console.print(table)
    return shown


def show_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table of figures."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            figures = ", ".join(f"{name} {value}" for name, value in zip(header[1:], row[1:]))
            print(f"{title} {row[0]}: {figures}")
        return
    table = Table(*header, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
