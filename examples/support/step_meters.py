"""What a piece of work costs: seconds, memory, operations, and how often the host waits for a value."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

READ = "aten::_local_scalar_dense"
"""What `.item()` and `bool(tensor)` dispatch."""


class Clock:
    """Seconds between `start` and `stop`: by CUDA events on a GPU, which has not done by then what it was told."""

    def __init__(self, device: str):
        self._on_gpu = device == "cuda"

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> float:
        end = self._now()
        if not self._on_gpu:
            return end - self._began
        end.synchronize()
        return self._began.elapsed_time(end) / 1000

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stopwatch:
    """Seconds, by the host's clock, of what it is told to watch: passes, looks, and steps of optimizers.

    Attributes:
        seconds: of all that has been watched; what is watched inside of something else counts once.
    """

    def __init__(self) -> None:
        self.seconds, self._runs = 0.0, False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch what is run inside."""
        began = None if self._runs else time.perf_counter()
        self._runs = True
        try:
            yield
        finally:
            if began is not None:
                self.seconds += time.perf_counter() - began
                self._runs = False

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch, in the block, steps of torch optimizers, and looks: forwards of `model` without gradient."""
        entered: list[contextlib.AbstractContextManager] = []

        def begin(*_: Any) -> None:
            entered.append(self.running())
            entered[-1].__enter__()

        def end(*_: Any) -> None:
            entered.pop().__exit__(None, None, None)

        hooks = [
            register_optimizer_step_pre_hook(begin),
            register_optimizer_step_post_hook(end),
            model.register_forward_pre_hook(lambda *_: None if torch.is_grad_enabled() else begin()),
            model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else end(), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Traced:
    """What a piece of work did.

    Attributes:
        peak: bytes that it held at most, above those it began with.
        operations: kernels on a GPU, dispatched operations (with those that they call) on the CPU.
        reads: how often the host waited for a value of a tensor.
    """

    peak: int
    operations: int
    reads: int


def traced(work: Callable[[], object], device: str) -> Traced:
    """`work`, run once under the profiler; on a GPU twice more, for its allocator and for what the host waits for."""
    if device == "cuda":
        return Traced(_gpu_peak(work), _kernels(work), _waits(work))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = trace.profiler.kineto_results.events()  # `trace.events()` takes longer than the work
    names = [e.name() for e in events]
    return Traced(_cpu_peak(events), sum(n.startswith("aten::") for n in names), names.count(READ))


def _cpu_peak(events: Iterable[Any]) -> int:
    """The largest sum of what the allocator gave and took back, in the order of time."""
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def _kernels(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    return sum(e.device_type() == DeviceType.CUDA for e in trace.profiler.kineto_results.events())


def _gpu_peak(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _waits(work: Callable[[], object]) -> int:
    """Host synchronisations, of which torch warns one by one in this mode."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def copy_bandwidth(size: int, device: str, times: int = 7) -> float:
    """Bytes a second that a copy between two kept buffers of `size` bytes reads and writes: the machine's own rate."""
    source, target = (torch.ones(max(size // 4, 1), device=device) for _ in range(2))
    clock, seconds = Clock(device), []
    for _ in range(times):
        clock.start()
        target.copy_(source)
        seconds.append(clock.stop())
    return 2 * 4 * source.numel() / median(seconds)
