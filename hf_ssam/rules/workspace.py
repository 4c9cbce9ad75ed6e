"""Where memory of a model's size comes from: on the CPU it is kept from step to step.

Fresh memory costs a page fault every four kilobytes, more than ten copies into memory that is there already. So a step
takes its copies from a `Workspace` and gives them back at its end. On a GPU the caching allocator does this, and every
copy is simply a new tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from . import device

_CURRENT: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


class Workspace:
    """Tensors on the CPU that steps borrow and give back.

    Args:
        keeps: whether memory is kept between steps; without it every copy is fresh.

    Attributes:
        kept: bytes that it holds on to between steps.
    """

    def __init__(self, keeps: bool = True):
        self._keeps = keeps
        self._free: dict[tuple, list[Tensor]] = {}
        self._lent: list[tuple[tuple, Tensor]] = []

    @property
    def kept(self) -> int:
        """Bytes that nobody uses until the next step."""
        return sum(t.nbytes for tensors in self._free.values() for t in tensors)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let `copies` borrow from here."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def borrow(self, like: Tensor) -> Tensor:
        """A tensor laid out like `like`, its content undefined."""
        if not self._keeps:
            return torch.empty_like(like)
        layout = like.shape, like.stride(), like.dtype
        free = self._free.get(layout)
        tensor = free.pop() if free else torch.empty_like(like, requires_grad=False)
        self._lent.append((layout, tensor))
        return tensor

    def reclaim(self, but: Iterable[Tensor] = ()) -> None:
        """Take back all that was borrowed, except the tensors `but`, which stay with who has them."""
        held = {id(t) for t in but}
        lent, self._lent = self._lent, []
        for layout, tensor in lent:
            if id(tensor) in held:
                self._lent.append((layout, tensor))
            else:
                self._free.setdefault(layout, []).append(tensor)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors`, in the memory of the workspace in use."""
    workspace = _CURRENT.get()
    if not tensors:
        return []
    with torch.no_grad():
        if workspace is None or not all(device.on_host(t.device) for t in tensors):
            return list(torch._foreach_clone(tensors))
        new = [workspace.borrow(t) for t in tensors]
        torch._foreach_copy_(new, tensors)
    return new
