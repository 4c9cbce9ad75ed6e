"""What models and runs are called beside each other."""

from __future__ import annotations

from pathlib import Path


def short_names(folders: list[str]) -> list[str]:
    """`a/run` and `b/run` stay apart; names on the Hub stay whole, and a model given twice is the same model."""
    paths = {f: Path(f).absolute().parts if Path(f).is_dir() else (f,) for f in folders}
    for depth in range(1, max(map(len, paths.values())) + 1):
        short = {f: "/".join(parts[-depth:]) for f, parts in paths.items()}
        if len(set(short.values())) == len(short):
            break
    return [short[f] for f in folders]
