"""One start of each worker for the whole session: processes are dear, scenarios are cheap."""

from __future__ import annotations

import pytest

from hf_ssam.trainer.checkpoints import save_state
from tests.distributed.launching import Runs, started
from tests.distributed.loops import SETTINGS, alone


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What `ddp_worker.py` left."""
    return started("ddp_worker.py", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="session")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What `fsdp2_worker.py` left; it finds in `alone` the state that a single process saved."""
    folder = tmp_path_factory.mktemp("fsdp2")
    save_state(folder / "alone", SETTINGS, alone().state_dict(), True, 10.0)
    return started("fsdp2_worker.py", folder)
