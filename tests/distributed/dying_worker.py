"""Two ranks that shard a model save checkpoint 2, and 4 over an earlier one; in the last save rank 1 is killed.

Usage: torchrun dying_worker.py FOLDER MOMENT. The moment is before rank 1 writes its shard, between (half of the file
is there), or after, on its way to the last file. As under the Trainer, rank 0 ends a save with `trainer_state.json`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from hf_ssam import TwoPass
from hf_ssam.trainer import checkpoints
from hf_ssam.trainer.vector_files import write_vectors
from tests.distributed.loops import SETTINGS, batches, loop, narrow


def saved(folder: Path, two_pass: TwoPass) -> None:
    """A save of the Trainer's, as far as it touches ours."""
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        checkpoints.discard_earlier_save(folder)
    dist.barrier()
    checkpoints.save_state(folder, SETTINGS, two_pass.state_dict(), dist.get_rank() == 0, 10.0)
    if dist.get_rank() == 0:
        (folder / checkpoints.TRAINER_STATE).write_text("{}")


def die_while_writing(moment: str):
    """What stands in for `write_vectors` on the rank that is killed."""

    def write(path: Path, *given) -> None:
        if moment != "before":
            write_vectors(path, *given)
        if moment == "between":
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return write


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    output_dir, model = Path(sys.argv[1]), narrow()
    engine = loop(fully_shard(model), model, batches(dist.get_rank(), 5, 2), "friendly_sam")
    for name in ("checkpoint-2", "checkpoint-4"):
        saved(output_dir / name, engine)
    dist.barrier()
    if dist.get_rank() == 1:
        checkpoints.write_vectors = die_while_writing(sys.argv[2])
    saved(output_dir / "checkpoint-4", engine)
