"""One start of two processes for the whole session: processes are dear, scenarios are cheap."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from hf_ssam.trainer.checkpoints import save_state
from tests.distributed.launching import Runs, TwoProcesses
from tests.distributed.loops import SETTINGS, alone


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Two ranks that run scenarios until the session ends."""
    processes = TwoProcesses(tmp_path_factory.mktemp("two_processes"))
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def ddp(two_processes: TwoProcesses) -> Runs:
    """What the scenarios of `ddp_worker.py` leave."""
    return Runs(two_processes, "ddp")


@pytest.fixture(scope="session")
def fsdp2(two_processes: TwoProcesses) -> Runs:
    """What those of `fsdp2_worker.py` leave; they find in `alone` the state that a single process saved."""
    runs = Runs(two_processes, "fsdp2")
    save_state(runs.folder / "alone", SETTINGS, alone().state_dict(), True, 10.0)
    return runs


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """What the scenarios of `deepspeed_worker.py` leave: two ranks of their own, since DeepSpeed marks its process."""
    if find_spec("deepspeed") is None:
        pytest.skip(
            "DeepSpeed is not installed, and nothing of it is tested: pip install -c constraints.txt deepspeed"
        )
    processes = TwoProcesses(tmp_path_factory.mktemp("zero"), "deepspeed_worker.py", {"DS_ACCELERATOR": "cpu"})
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def adapters(two_processes: TwoProcesses) -> Runs:
    """What those of `adapters_worker.py` leave."""
    return Runs(two_processes, "adapters")


@pytest.fixture(scope="session")
def methods(two_processes: TwoProcesses) -> Runs:
    """What those of `methods_worker.py` leave."""
    return Runs(two_processes, "methods")


@pytest.fixture(scope="session")
def tensor(two_processes: TwoProcesses) -> Runs:
    """What those of `tensor_worker.py` leave."""
    return Runs(two_processes, "tensor")
