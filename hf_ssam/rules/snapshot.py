"""Tensors as they were, to be put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .tensors import copies, current


class Snapshot:
    """Copies of tensors.

    Args:
        tensors: the tensors to remember; their storage is what `restore` writes to.
        offload: keep the copies in host memory; exact as well, since a copy between devices rounds nothing.

    Attributes:
        tensors: what is remembered.
        copies: as it was.
    """

    def __init__(self, tensors: Iterable[Tensor], offload: bool = False):
        self.tensors = list(tensors)
        on_host = offload and any(t.device.type != "cpu" for t in self.tensors)
        self.copies = [t.detach().to("cpu", copy=True) for t in self.tensors] if on_host else copies(self.tensors)

    def restore(self) -> None:
        """Write the copies back in place; an interrupt that comes meanwhile is raised once all of them are back."""
        try:
            self._copy_back()
        except BaseException:
            self._copy_back()
            raise

    def release(self) -> None:
        """Let the workspace in use lend the memory of the copies again."""
        current().take_back(self.copies)

    def _copy_back(self) -> None:
        if self.tensors:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self.copies)
