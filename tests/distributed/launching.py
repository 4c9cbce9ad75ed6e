"""Two processes that start once for the whole session, and run a scenario when a test asks for its result.

A scenario only runs and saves what came out; what must hold is asserted by the tests, in the process of pytest, so
that one start serves many tests and a failure names the cell that broke.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tests.support.garbage import pass_over_what_is_there, passing_over_imports

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORLD = 2
ENDS = "ENDS_OF_PIPES"
"""The variable that tells the ranks' process its ends of the pipes: for each rank, names in and answers out."""

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
    """Run a script of this folder in two processes of its own, on ports that are free."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}")
    return run([*launcher, str(HERE / worker), *argv])


def files_of(folder: Path, name: str) -> list[Path]:
    """What the scenario `name` leaves in `folder`: a file a rank."""
    return [folder / name / f"rank{r}.pt" for r in range(WORLD)]


class TwoProcesses:
    """The ranks of one group, waiting for scenarios by name; the first one that is asked for starts them.

    Results stay in `folder`: asked for again, they are read again. A scenario that fails ends both ranks (one may wait
    for the other), and the next one starts new ones.

    Args:
        folder: where they write.
        worker: the script of this folder that they run.
        given: variables of their environment.
    """

    def __init__(self, folder: Path, worker: str = "worker.py", given: Mapping[str, str] = MappingProxyType({})):
        self.folder, self._worker, self._given = folder, worker, given
        self._process: subprocess.Popen[bytes] | None = None
        self._ranks: list[tuple[TextIO, TextIO]] = []

    def __getitem__(self, name: str) -> list[Any]:
        """What scenario `name` left, with one entry a rank."""
        files = files_of(self.folder, name)
        if not all(f.is_file() for f in files):
            self._run(name)
        return [torch.load(f, weights_only=False) for f in files]

    def _run(self, name: str) -> None:
        if self._process is None:
            self._start()
        try:
            for names, _ in self._ranks:
                print(name, file=names, flush=True)
            for _, answers in self._ranks:
                assert answers.readline().strip() == name, f"the scenario {name} failed:\n{self._log()}"
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        """One process, which imports and then becomes both ranks (`become_ranks`)."""
        names, answers = ([os.pipe() for _ in range(WORLD)] for _ in range(2))
        theirs = [(names[rank][0], answers[rank][1]) for rank in range(WORLD)]
        with open(self.folder / "ranks.log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / self._worker), str(self.folder)],
                env={**environment(), **self._given, ENDS: json.dumps(theirs)},
                cwd=ROOT,
                pass_fds=[end for ends in theirs for end in ends],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for end in (end for ends in theirs for end in ends):
            os.close(end)
        self._ranks = [(open(names[rank][1], "w"), open(answers[rank][0])) for rank in range(WORLD)]

    def _log(self) -> str:
        return (self.folder / "ranks.log").read_text()[-10000:]

    def stop(self) -> None:
        """End both ranks and what they wait for."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for end in (end for ends in self._ranks for end in ends):
            with contextlib.suppress(BrokenPipeError):
                end.close()
        self._process, self._ranks = None, []
        (self.folder / "rendezvous").unlink(missing_ok=True)


class Runs:
    """The scenarios of one kind: `Runs(processes, "ddp")["resume/rank"]` is `processes["ddp/resume/rank"]`."""

    def __init__(self, processes: TwoProcesses, kind: str):
        self._processes, self._kind = processes, kind
        self.folder = processes.folder / kind

    def __getitem__(self, name: str) -> list[Any]:
        return self._processes[f"{self._kind}/{name}"]

    def folder_of(self, name: str) -> Path:
        """Where scenario `name` has written."""
        assert self[name]
        return self.folder / name


def become_ranks() -> tuple[TextIO, TextIO]:
    """Become both ranks of a group: what they import takes longer than scenarios, and is imported once.

    Returns:
        Where this rank reads names of scenarios, and where it writes those that are done.
    """
    ends = json.loads(os.environ.pop(ENDS))
    rank = 0 if os.fork() else 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    random.seed(rank), np.random.seed(rank)  # ranks of their own draw apart
    for end in ends[1 - rank]:
        os.close(end)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=rank, world_size=WORLD)
    names, answers = ends[rank]
    return open(names), open(answers, "w")


def close_groups() -> None:
    """Destroy every group but the world's: a scenario's meshes are over, and each of gloo's threads polls on.

    The threads end with the last reference to a group, and torch's caches keep the meshes, which keep theirs.
    """
    groups = [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]
    names = tuple(group.group_name for group in groups)
    for group in groups:
        dist.destroy_process_group(group)
    for mesh in [o for o in gc.get_objects() if isinstance(o, DeviceMesh)] if groups else ():
        mesh._pg_registry.clear()
    forget_addresses(names)


def forget_addresses(groups: tuple[str, ...]) -> None:
    """Let no later group of the same ranks, which torch names alike, call at the addresses of one that is closed."""
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    for key in store.list_keys() if dist.get_rank() == 0 else ():
        if key.startswith(groups):
            store.delete_key(key)
    dist.barrier()


def main(scenarios: Mapping[str, Scenario], after: Callable[[], None] = lambda: None) -> None:
    """Run scenarios: those that the command line names, `worker.py FOLDER NAME …`, or those that somebody asks for.

    Each has a folder of its own in FOLDER, by its name, and `after` cleans up behind it. The name of one that is done
    is the answer.
    """
    names, answers = (sys.argv[2:], sys.stdout) if sys.argv[2:] else become_ranks()
    torch.set_num_threads(1)
    pass_over_what_is_there()
    folder = Path(sys.argv[1])
    for name in map(str.strip, names):
        with passing_over_imports():
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            result = scenarios[name](folder / name)
            assert dist.get_world_size() == WORLD, f"{dist.get_world_size()} processes in place of {WORLD}"
            torch.save(result, files_of(folder, name)[dist.get_rank()])
            after()
        print(name, file=answers, flush=True)
    dist.destroy_process_group()
