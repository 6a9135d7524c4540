"""Which files of a folder are the seeds' embeddings, and what its manifest misses."""

import json
import re
from pathlib import Path

from blip3o_lit.config.errors import UserError

UNFINISHED = ("extraction_checkpoint.pkl", "emergency_checkpoint.pkl")
PATTERNS = {
    "auto": ("embeddings_shard_*.pkl", "*.pkl", "*.pt", "*.pth"),
    "patch_only": ("embeddings_shard_*_patch_only.pkl", "*_patch_only.pkl"),
    "cls_patch": ("embeddings_shard_*_cls_patch.pkl", "*_cls_patch.pkl"),
}


def legacy_files(source: Path, mode: str) -> list[Path]:
    """Return the embedding files of a folder in the order of their numbers, or the one file named.

    Unfinished checkpoints count only where there is nothing else.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"source={source} does not exist: name the seeds' .pkl file or its folder")
    for pattern in (*PATTERNS.get(mode, ()), *PATTERNS["auto"]):
        files = [path for path in source.glob(pattern) if path.is_file()]
        if files:
            break
    else:
        raise UserError(f"source={source} holds no .pkl file of the seeds")
    files = [path for path in files if path.name not in UNFINISHED] or files[:1]
    kinds = {re.sub(r"\d+", "", path.stem) for path in files}
    if len(kinds) > 1:
        both = all(any(kind.endswith(end) for kind in kinds) for end in ("cls_patch", "patch_only"))
        fix = "mode=patch_only or mode=cls_patch" if both else "source=FILE"
        raise UserError(f"source={source} holds several kinds of files: choose with {fix}")
    return sorted(files, key=_number)


def _number(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+", path.stem)
    return (int(digits[0]) if digits else 0, path.name)


def manifest_problems(source: Path, files: list[Path], samples: list[int]) -> list[str]:
    """Compare a folder's files, of so many samples each, with its `embeddings_manifest.json`."""
    path = source / "embeddings_manifest.json"
    if not path.is_file():
        return []
    try:
        manifest = json.loads(path.read_bytes())
        promised = {Path(str(s["output_path"])).name: s for s in manifest["shards"]}
        failed = [str(item) for item in manifest.get("failed_shards") or []]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no manifest of the seeds: remove it or copy it again"
        ) from error
    counts = {file.name: count for file, count in zip(files, samples)}
    problems = [
        f"{name} is in the manifest, not in the folder" for name in promised if name not in counts
    ]
    for name, count in counts.items():
        due = promised.get(name, {}).get("total_samples", count)
        if due != count:
            problems.append(f"{name} holds {count} samples, the manifest says {due}")
    return problems + [f"the manifest counts a failed shard: {item[:80]}" for item in failed]
