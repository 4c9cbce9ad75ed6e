"""Searches for garbage pass over what imports made.

Each run of the Trainer searches several times, and imports leave a million objects: most of the time of a short run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def pass_over_what_is_there() -> None:
    """Objects that are there now are not looked at any more; they end with their last reference."""
    gc.collect()
    gc.freeze()


@contextmanager
def passing_over_imports() -> Iterator[None]:
    """The same at the end of the block, where something was imported in it."""
    before = len(sys.modules)
    yield
    if len(sys.modules) > before:
        pass_over_what_is_there()
