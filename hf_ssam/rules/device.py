"""The one question that arithmetic asks of a device."""

from __future__ import annotations

import torch


def on_host(device: torch.device) -> bool:
    """Whether tensors on `device` are in the host's own memory.

    There a value is read without waiting (law 7), fresh memory costs page faults, and sums run one number after the
    other. An accelerator has none of this: its values are waited for, its allocator keeps memory, it sums in a tree.
    """
    return device.type == "cpu"
