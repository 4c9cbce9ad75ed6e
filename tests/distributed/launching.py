"""Starts a worker in two processes and reads what each left.

A worker is a script of named scenarios. It only runs them and saves what came out; what must hold is asserted by the
tests, in the process of pytest, so that one start serves many tests and a failure names the cell that broke.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORLD = 2

Scenario = Callable[[Path], Any]


def environment() -> dict[str, str]:
    """This environment for a child: one thread a process, the repository importable, no device."""
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    return {**outside, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(
    command: Sequence[str], variables: Mapping[str, str] = MappingProxyType({}), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, with `variables` over the `environment`."""
    return subprocess.run(
        command, env={**environment(), **variables}, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def torchrun(worker: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder in two processes, on ports that are free."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}")
    return run([*launcher, str(HERE / worker), *argv])


class Runs:
    """What the scenarios of one start left, by name: `runs["resume/rank"]` is a list with one entry a rank."""

    def __init__(self, folder: Path, log: str):
        self.folder, self.log = folder, log

    def __getitem__(self, name: str) -> list[Any]:
        files = [self.folder / f"{name.replace('/', '.')}.rank{r}.pt" for r in range(WORLD)]
        missing = [f.name for f in files if not f.is_file()]
        assert not missing, f"the scenario {name} left no {missing[0]}; the end of the log:\n{self.log[-5000:]}"
        return [torch.load(f, weights_only=False) for f in files]


def started(worker: str, folder: Path) -> Runs:
    """Run every scenario of `worker`."""
    done = torchrun(worker, str(folder))
    return Runs(folder, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")


def main(scenarios: Mapping[str, Scenario]) -> None:
    """The main program of a worker, `worker.py FOLDER [BEGINNING OF A NAME …]`; a scenario has its own folder."""
    torch.set_num_threads(1)
    folder, beginnings = Path(sys.argv[1]), tuple(sys.argv[2:]) or ("",)
    for name, scenario in scenarios.items():
        if name.startswith(beginnings):
            own = folder / name.replace("/", ".")
            own.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints each log entry
                result = scenario(own)
            assert dist.get_world_size() == WORLD, f"{dist.get_world_size()} processes in place of {WORLD}"
            torch.save(result, f"{own}.rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
