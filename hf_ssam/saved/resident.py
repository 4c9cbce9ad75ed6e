"""How much memory something takes, as the system sees it.

Counted is the resident size of the process: what torch allocates, and what the allocator keeps of it after it was
freed. (glibc keeps less, and takes longer, with `MALLOC_MMAP_THRESHOLD_=131072` in the environment; see mallopt(3).)
Linux remembers the highest size and lets a process start that over (`/proc/self/clear_refs`, proc(5)); where it may
not be started over, the peak is that of the whole process, an upper bound.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _RESTART = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"


def now() -> float | None:
    """Resident size of this process, MiB; None on systems that do not tell."""
    return _read("VmRSS")


def peak_of(call: Callable[[], Any]) -> tuple[Any, float | None]:
    """What `call()` returns, and the highest resident size while it ran, MiB."""
    with contextlib.suppress(OSError):
        _RESTART.write_text(_PEAK)
    return call(), _read("VmHWM")


def _read(field: str) -> float | None:
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) / 1024
