"""A rank that runs every kind of scenario; started by `launching.TwoProcesses`."""

from __future__ import annotations

from tests.distributed import adapters_worker, ddp_worker, fsdp2_worker, methods_worker, tensor_worker
from tests.distributed.launching import close_groups, main

KINDS = {
    "adapters": adapters_worker,
    "ddp": ddp_worker,
    "fsdp2": fsdp2_worker,
    "methods": methods_worker,
    "tensor": tensor_worker,
}
SCENARIOS = {f"{kind}/{name}": run for kind, module in KINDS.items() for name, run in module.SCENARIOS.items()}

if __name__ == "__main__":
    main(SCENARIOS, close_groups)
