"""Runs an example as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "configs" / "tasks"


def run_script(name: str, *argv: object, launcher: tuple[str, ...] = ()) -> str:
    """What `examples/NAME` prints on a good end; `launcher` goes between the interpreter and the script."""
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), *map(str, argv)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout
