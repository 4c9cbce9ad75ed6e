"""Several GPUs, or one: DDP over NCCL, FSDP2, DeepSpeed, SyncBatchNorm. Run with `pytest -m gpu`.

Needs as many processes as there are GPUs, at most two. On one GPU, FSDP2 still shards (over one rank); what needs two
ranks says so by asserting how many GPUs there are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launching import ROOT, run
from tests.support.cases import assert_close, assert_identical

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

CONFIGS = ROOT / "configs" / "accelerate"
WORKER = str(ROOT / "tests" / "gpu" / "distributed_worker.py")


def processes(least: int = 1) -> int:
    """One process a GPU, at most two."""
    count = min(torch.cuda.device_count(), 2)
    assert count >= least, f"this test needs {least} GPUs, and there are {count}"
    return count


def launched(config: str, folder: Path, name: str, count: int, *flags: str) -> list[Any]:
    """What every rank of a scenario left."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))}
    done = run([*command, "--num_processes", str(count), *flags, WORKER, str(folder), name], visible)
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{name}.rank{r}.pt", weights_only=False) for r in range(count)]


@pytest.mark.parametrize("scope", ["global", "rank", "micro_batch"])
def test_ranks_hold_the_same_bits_over_nccl(tmp_path, scope):
    """Law 5."""
    first, second = launched("multi_gpu.yaml", tmp_path, f"ddp-{scope}", processes(2))
    assert_identical(first["weights"], second["weights"])


def test_two_gpus_equal_one(tmp_path):
    """Law 4."""
    count = processes(2)
    (alone,) = launched("single_gpu.yaml", tmp_path / "one", "whole", 1)
    for rank in launched("multi_gpu.yaml", tmp_path / "two", "halves", count):
        assert_close(rank["weights"], alone["weights"], atol=1e-5)


@pytest.mark.parametrize("method", ["ssam", "sam", "asam"])
def test_fsdp2_equals_one_gpu(tmp_path, method):
    """Law 4, through the shipped configuration, in float32."""
    count = processes()
    (alone,) = launched("single_gpu.yaml", tmp_path / "one", f"plain-{method}-{count}", 1)
    for rank in launched("fsdp2.yaml", tmp_path / "shards", f"shards-{method}", count, "--mixed_precision", "no"):
        assert_close(rank["weights"], alone["weights"], atol=1e-5)


@pytest.mark.parametrize("rho", ["0", "0.05"])
def test_context_parallelism_equals_one_gpu(tmp_path, rho):
    """Law 4: two ranks hold a half of each sequence; Accelerate has it under FSDP2 alone, so not on a CPU."""
    split = ["--use_parallelism_config", "--parallelism_config_cp_size", "2", "--mixed_precision", "no"]
    ranks = launched("fsdp2.yaml", tmp_path / "split", f"context-{rho}", processes(2), *split)
    (alone,) = launched("single_gpu.yaml", tmp_path / "one", f"context-{rho}", 1)
    for rank in ranks:
        assert_close(rank["weights"], alone["weights"], atol=1e-5)


def test_fsdp2_under_bf16_perturbs_float32_weights(tmp_path):
    """The configuration as shipped: pass 2 sees another function, and nothing of the perturbation is lost."""
    for rank in launched("fsdp2.yaml", tmp_path, "shards-ssam", processes()):
        steps = [e for e in rank["log"] if "ssam/ascent_loss" in e]
        assert steps and all(e["ssam/ascent_loss"] != e["ssam/loss"] for e in steps)
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in rank["weights"].values())
        assert not rank["lost"]


def test_fsdp2_resumes(tmp_path):
    """Law 8: sharded checkpoints, of the method's state too."""
    for rank in launched("fsdp2.yaml", tmp_path, "resumed", processes(), "--mixed_precision", "no"):
        assert_identical(rank["halves"]["weights"], rank["whole"]["weights"])


def test_fsdp2_refuses_the_narrow_scopes(tmp_path):
    for rank in launched("fsdp2.yaml", tmp_path, "narrow", processes()):
        assert rank["said"].startswith("ascent_scope: `rank` needs each rank's own whole gradient")


def test_zero_equals_one_gpu(tmp_path):
    """Law 4, in float32."""
    count = processes()
    (alone,) = launched("single_gpu.yaml", tmp_path / "one", f"plain-ssam-{count}", 1)
    for rank in launched("deepspeed_zero2.yaml", tmp_path / "zero", "shards-ssam", count, "--mixed_precision", "no"):
        assert_close(rank["weights"], alone["weights"], atol=1e-5)


def test_zero_under_bf16_adds_the_perturbation_to_the_master_weights(tmp_path):
    """The configuration as shipped: pass 2 sees another function though the model's weights are in bfloat16."""
    first, *others = launched("deepspeed_zero2.yaml", tmp_path, "shards-ssam", processes())
    steps = [e for e in first["log"] if "ssam/ascent_loss" in e]
    assert steps and all(e["ssam/ascent_loss"] > e["ssam/loss"] for e in steps)
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in first["weights"].values())
    for rank in others:
        assert_identical(rank["weights"], first["weights"])


def test_zero_under_fp16_skips_what_overflows(tmp_path):
    """The first loss scale is 2¹⁶ and more: the engine lowers it, on all ranks alike, and the scheduler waits."""
    first, *others = launched("deepspeed_zero2.yaml", tmp_path, "half", processes(), "--mixed_precision", "fp16")
    skipped = sum(e.get("ssam/skipped_steps", 0) for e in first["log"])
    assert 0 < skipped < first["steps"] and first["scheduled"] == first["steps"] - skipped
    assert all(t.isfinite().all() for t in first["weights"].values())
    for rank in others:
        assert_identical(rank["weights"], first["weights"])


def test_zero_resumes(tmp_path):
    """Law 8: the engine's checkpoint, and the method's state beside it."""
    for rank in launched("deepspeed_zero2.yaml", tmp_path, "resumed", processes()):
        assert_identical(rank["halves"]["weights"], rank["whole"]["weights"])


def test_sync_batch_norm_moves_once_a_step(tmp_path):
    """Law 6; torch refuses SyncBatchNorm on the CPU."""
    first, second = launched("multi_gpu.yaml", tmp_path, "sync_batch_norm", processes(2))
    assert_identical(first["weights"], second["weights"])
    for rank in (first, second):
        assert rank["kinds"] == {"SyncBatchNorm"}
        assert all(int(t) == 3 for n, t in rank["weights"].items() if n.endswith("num_batches_tracked"))
        buffers = [n for n in rank["stock"] if "running_" in n]
        assert buffers and all(torch.equal(rank["tiny"][n], rank["stock"][n]) for n in buffers)
