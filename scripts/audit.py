"""What the locked dependencies bring along: licences, from what is installed, and known holes.

make audit, or: .venv/bin/python scripts/audit.py [licences]

Licences need no network; pip-audit looks known vulnerabilities up in the OSV database. pip-licenses
would give the texts of the metadata as they are: `Apache 2.0` and `MIT OR GPL-3.0-only` would still
have to be understood, which is what most of this file does.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-docs.lock")
PIP_AUDIT = "pip-audit>=2.9,<3"
PERMISSIVE = {
    *("0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
    *("CNRI-Python", "HPND", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib"),
}
"""Licences that ask for no more than their own text to be kept."""
UNKNOWN = "unknown"
SPOKEN = {
    r"(the )?mit( license)?( \(mit\))?": "MIT",
    r"apache([ -]software)?([ -]license)?,?( version)?[ -]?(2(\.0)?)?( license)?": "Apache-2.0",
    r"(new |modified |[23][ -]clause )?bsd([ -][23][ -]clause)?( license)?": "BSD",
    r"isc( license)?( \(iscl\))?": "ISC",
    r"mozilla public license 2\.0( \(mpl 2\.0\))?": "MPL-2.0",
    r"python software foundation license": "PSF-2.0",
    r"the unlicense( \(unlicense\))?": "Unlicense",
    r"(licenseref-)?nvidia[ -]proprietary( software)?": "NVIDIA-Proprietary",
}
"""Names of licences as metadata writes them out -> SPDX identifiers, or what comes near."""
UNSAID = {"cuda-toolkit": "NVIDIA-Proprietary"}
"""Packages whose metadata says nothing; this one only names NVIDIA's others."""


def locked() -> set[str]:
    """Return the names of the packages that the lock files list."""
    texts = [(ROOT / lock).read_text("utf-8") for lock in LOCKS]
    names = re.findall(r"^([A-Za-z0-9._-]+)==", "".join(texts), re.MULTILINE)
    return {canonicalize_name(name) for name in names}


def licence(package: Distribution) -> str:
    """Return a package's licence as an SPDX expression, or `unknown`.

    The expression of its metadata comes first, then its one-line licence field, then its trove
    classifiers, all of which hold.
    """
    about = package.metadata
    classifiers = [
        name.rpartition("::")[2].strip()
        for name in about.get_all("Classifier") or []
        if name.startswith("License ::") and "DFSG" not in name
    ]
    for text in (about.get("License-Expression"), about.get("License")):
        expression = _expression(text or "")
        if expression:
            return expression
    names = [_expression(name) for name in classifiers]
    if names and all(names):
        return " AND ".join(dict.fromkeys(names))
    return UNSAID.get(canonicalize_name(about["Name"]), UNKNOWN)


def _expression(text: str) -> str:
    """Return an SPDX expression of known identifiers without parentheses, or an empty text."""
    parts = re.split(r"( AND | OR )", text.strip())
    if len(parts) > 1:
        parts = [part.replace("(", "").replace(")", "") for part in parts]
    known = [_identifier(part) for part in parts[::2]]
    if not all(known):
        return ""
    parts[::2] = known
    return "".join(parts)


def _identifier(name: str) -> str:
    """Return the SPDX identifier of one licence, or an empty text."""
    name = name.partition(" WITH ")[0].strip()
    if name in PERMISSIVE or re.fullmatch(r"((A|L)?GPL|MPL)-\S+", name):
        return name
    for words, identifier in SPOKEN.items():
        if re.fullmatch(words, name, re.IGNORECASE):
            return identifier
    return ""


def permissive(expression: str) -> bool:
    """Whether one side of an SPDX expression without parentheses has permissive licences only."""
    return any(
        all(part in PERMISSIVE for part in side.split(" AND ")) for side in expression.split(" OR ")
    )


def installed() -> dict[str, Distribution]:
    """Return the packages of this environment and, where it is there, of the documentation's."""
    docs = [str(path) for path in (ROOT / ".venv" / "docs").glob("lib/python*/site-packages")]
    packages = [*(distributions(path=docs) if docs else ()), *distributions()]
    return {canonicalize_name(package.metadata["Name"]): package for package in packages}


def licences() -> dict[str, str]:
    """Return the licence of each locked package that is installed."""
    here = installed()
    return {name: licence(here[name]) for name in sorted(locked() & set(here))}


def show_licences() -> bool:
    """Print how many packages have which licence and who asks for more; False: one is unknown."""
    names, by_name = locked(), licences()
    free = {name for name, text in by_name.items() if permissive(text)}
    print(f"{len(names)} locked packages, {len(by_name)} of them installed here")
    print(f"permissive: {len(free)}")
    for kind in sorted({text for name, text in by_name.items() if name not in free}):
        print(f"{kind}: {', '.join(name for name, text in by_name.items() if text == kind)}")
    absent = sorted(names - set(by_name))
    print(f"not installed here (other systems or Pythons): {', '.join(absent) or 'none'}")
    return UNKNOWN not in by_name.values()


def show_vulnerabilities() -> bool:
    """Look every locked version up; False: something is known, or nothing could be asked."""
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    if not Path(uv).is_file():
        print("error: pip-audit is run by uv, which is missing: pip install uv", file=sys.stderr)
        return False
    locks = [word for lock in LOCKS for word in ("-r", str(ROOT / lock))]
    command = [
        *(uv, "tool", "run", "--quiet", PIP_AUDIT, *locks, "--require-hashes", "--disable-pip"),
        *("--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1].strip()
        host = re.search(r"host='([^']+)'", reason)
        why = f"{host[1]} can't be reached" if host else f"pip-audit failed: {reason[:200]}"
        print(f"error: no vulnerability was looked up: {why}", file=sys.stderr)
        return False
    holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {hole['id']}, mended in {mended}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(f"{len(packages)} packages looked up, {len(holes)} known vulnerabilities")
    if skipped:
        print(f"not looked up: {', '.join(skipped)}")
    return not holes and not skipped


def main(words: list[str]) -> int:
    """Print both parts, or `licences` alone; returns the exit status."""
    fine = show_licences()
    return int(not ((words == ["licences"] or show_vulnerabilities()) and fine))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
