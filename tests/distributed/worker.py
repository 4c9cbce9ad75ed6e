"""A rank that runs every kind of scenario; started by `launching.TwoProcesses`."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from tests.distributed import adapters_worker, ddp_worker, fsdp2_worker, methods_worker
from tests.distributed.launching import WORLD, main

KINDS = {"adapters": adapters_worker, "ddp": ddp_worker, "fsdp2": fsdp2_worker, "methods": methods_worker}
SCENARIOS = {f"{kind}/{name}": run for kind, module in KINDS.items() for name, run in module.SCENARIOS.items()}

if __name__ == "__main__":
    meeting = f"file://{sys.argv[1]}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=int(os.environ["RANK"]), world_size=WORLD)
    main(SCENARIOS)
