"""Parts that other packages bring: a network, path, solver, tower, metric or baseline by name.

A package names its module in the entry-point group `blip3o_lit.plugins`; importing it runs the
decorators below, as `@register.network("mine")`. It is imported when a name is asked for that this
package lacks. A checkpoint names a part, never a module: only what is installed is imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from blip3o_lit.config.errors import UserError, nearest, one_of

GROUP = "blip3o_lit.plugins"
Built = TypeVar("Built", bound=Callable[..., Any])
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_loading: list[EntryPoint] = []
_loaded: list[bool] = []


@dataclass(frozen=True)
class Part:
    """What was registered: how it is built, where it came from, and its options' defaults."""

    build: Callable[..., Any]
    package: str
    version: str
    options: dict[str, Any] = field(default_factory=dict)


class Registry:
    """The names of one kind: this package's own, and those that others register.

    An instance is the decorator: `@register.path("mine")`.
    """

    def __init__(self, kind: str, key: str, built_in: tuple[str, ...] = ()) -> None:
        self.kind, self.key, self.built_in = kind, key, built_in
        self.parts: dict[str, Part] = {}

    def __call__(self, name: str, **options: Any) -> Callable[[Built], Built]:
        """Register what is decorated; `options` are keys that it takes, with their defaults."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{self.kind} {name!r}: a name has small letters, digits and _ alone")

        def register(build: Built) -> Built:
            package, version = build.__module__, ""
            if _loading and _loading[-1].dist is not None:
                package, version = _loading[-1].dist.name, _loading[-1].dist.version
            part = Part(build, package, version, options)
            before = self.parts.get(name)
            if name in self.built_in or (before is not None and before.package != package):
                whose = before.package if before else "blip3o_lit itself"
                raise UserError(f"{package} registers the {self.kind} {name}, which {whose} has")
            self.parts[name] = part
            return build

        return register

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter([*self.built_in, *sorted(self._all())])

    def __len__(self) -> int:
        return len(self.built_in) + len(self._all())

    def own(self, name: str) -> Part | None:
        """Return what another package registered under a name, or None."""
        return None if name in self.built_in else self._all().get(name)

    def build(self, name: str, *arguments: Any) -> Any:
        """Build a registered part.

        Raises:
            UserError: If no package has registered the name.
        """
        one_of(self.key, name, self)
        return self._all()[name].build(*arguments)

    def with_defaults(self, name: str, options: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Return a part's options, those left out by their defaults; other words are refused."""
        part = self.own(name)
        defaults = part.options if part else {}
        for key in options:
            if key not in defaults:
                guess = nearest(key, defaults)
                hint = f"did you mean {prefix}{guess}?" if guess else f"it has {[*defaults]}"
                raise UserError(f"{prefix}{key} is no option of {self.key}={name}: {hint}")
        return defaults | options

    def _all(self) -> dict[str, Part]:
        load_plugins()
        return self.parts


network = Registry("network", "model.architecture", ("dit", "nextdit"))
path = Registry("path", "flow.path", ("linear", "trigonometric", "seed_linear", "seed_cosine"))
solver = Registry(
    "solver",
    "solver.name",
    ("mean", "euler", "midpoint", "heun", "rk4", "ab2", "dopri5", "map", "fitted"),
)
tower = Registry(
    "tower",
    "towers.*.kind",
    ("open_clip", "timm", "transformers", "huggingface", "eva_clip", "demo"),
)
metric = Registry("metric", "metrics")
baseline = Registry("baseline", "own_baselines")
STORED = {"network": network, "path": path, "solver": solver}
"""The kinds that a checkpoint is built from."""


def load_plugins() -> None:
    """Import the modules that installed packages name, once.

    Raises:
        UserError: If one of them can't be imported.
    """
    if _loaded or _loading:
        return
    for entry in entry_points(group=GROUP):
        _loading.append(entry)
        try:
            entry.load()
        except UserError:
            raise
        except Exception as error:  # whatever that package does
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the plugin {entry.name} ({_package(entry)}) can't be imported: "
                f"{type(error).__name__}: {reason}: mend or uninstall it"
            ) from error
        finally:
            _loading.pop()
    _loaded.append(True)


def config_folders() -> list[Path]:
    """Return the folders `conf/` of the packages that have one beside their plugin module."""
    folders = []
    for entry in entry_points(group=GROUP):
        spec = importlib.util.find_spec(entry.module)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "conf"
            folders += [folder] if folder.is_dir() else []
    return folders


def origins(names: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return, for a checkpoint's record, where those parts came from that are not this package's.

    `names` are the parts by kind, as `{"network": "dit"}`.
    """
    found = {kind: (name, STORED[kind].own(name)) for kind, name in names.items()}
    return {
        kind: {"name": name, "package": part.package, "version": part.version}
        for kind, (name, part) in found.items()
        if part is not None
    }


def check_origins(place: str, record: Any) -> None:
    """Refuse a checkpoint whose parts' package is not installed, and name that package."""
    for kind, part in record.items() if isinstance(record, dict) else ():
        if kind in STORED and isinstance(part, dict) and str(part.get("name")) not in STORED[kind]:
            package = f"{part.get('package')} {part.get('version')}".strip()
            raise UserError(
                f"{place}: its {kind} {part.get('name')} comes from the package {package}, which "
                "is not installed: install it, or put it on PYTHONPATH"
            )


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module
