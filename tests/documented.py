"""Pages of the documentation and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

DOCS = ROOT / "docs"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


# Commands of others, which no test runs.
FOREIGN = {
    "git": "needs the repository's address",
    "hf": "downloads gigabytes",
    "printf": "the shell's own",
    "sbatch": "needs a Slurm cluster",
    "scontrol": "needs a Slurm cluster",
    "source": "the shell's own",
    "torchrun": "starts processes; what it starts is checked",
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, without the indent of a list."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^\1```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of a page's shell blocks, without set variables."""
    for block in blocks(page, "(?:bash|sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s|\s\|\s", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words
