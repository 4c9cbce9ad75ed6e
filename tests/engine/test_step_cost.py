"""What a step costs beyond its passes, counted: bytes allocated, operations dispatched, values read by the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_ssam import TwoPass
from hf_ssam.methods.ausam import average_rise
from hf_ssam.rules import tensors
from hf_ssam.rules.state import MethodState
from tests.support.cases import WHOLE_MODEL


class Counter(TorchDispatchMode):
    """Counts what is dispatched while it is not paused: a pass is not the engine's own cost."""

    def __init__(self):
        super().__init__()
        self.paused, self.operations, self.allocated, self.reads = False, [], 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self.operations.append(func.name())
            self.reads += func.name() == "aten::_local_scalar_dense"
            new = {t.untyped_storage().data_ptr(): t for t in tree_leaves(out) if isinstance(t, Tensor)}
            self.allocated += sum(t.untyped_storage().nbytes() for ptr, t in new.items() if ptr not in before)
        return out

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


def network(layers: int, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def counted(method: str, layers: int, steps: int, **options) -> Counter:
    """What the last of `steps` steps cost beyond its passes."""
    model, x = network(layers), torch.randn(4, 64)
    engine, optimizer = TwoPass(model, method, 0.1, **options), torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        counter = Counter()

        def run(indices=slice(None), counter=counter) -> Tensor:
            with counter.pause():
                loss = model(x[indices]).square().mean()
                loss.backward()
            return loss

        with counter:
            engine.step(run)
        optimizer.step()
        optimizer.zero_grad()
    return counter


WHOLE = sorted({*WHOLE_MODEL} - {"sparse_sam", "esam", "ausam"})
"""Methods that look at no single samples."""


@pytest.mark.parametrize("method", WHOLE)
def test_a_later_step_allocates_nothing_of_the_models_size(method):
    """Its copies are in memory that the step before has left; a tenth of the model leaves room for scalars."""
    model_bytes = sum(p.nbytes for p in network(10).parameters())
    assert counted(method, 10, steps=3).allocated < model_bytes / 10


def test_with_free_snapshot_each_step_allocates_its_copy_anew():
    model_bytes = sum(p.nbytes for p in network(10).parameters())
    assert model_bytes <= counted("ssam", 10, steps=3, free_snapshot=True).allocated < 1.1 * model_bytes


@pytest.mark.parametrize("method", ["ssam", "sam", "usam"])
def test_memory_kept_between_steps_is_one_copy_of_the_weights(method):
    model, x = network(10), torch.randn(4, 64)
    engine = TwoPass(model, method, 0.1)
    for _ in range(3):
        engine.step(lambda: _backward(model(x).square().mean()))
        model.zero_grad()
    assert engine._workspace.kept == sum(p.nbytes for p in model.parameters())


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


@pytest.mark.parametrize("method", ["ssam", "sam", "usam", "asam", "wsam"])
def test_an_accelerators_operations_do_not_grow_with_the_number_of_tensors(method, monkeypatch):
    """On an accelerator's path (no free reads, no kept memory) a step dispatches as much for 8 tensors as for 80."""
    monkeypatch.setattr(tensors, "HOST", frozenset())
    few, many = (counted(method, layers, steps=2) for layers in (4, 40))
    launched = [[o for o in c.operations if not _is_view(o)] for c in (few, many)]
    assert launched[0] == launched[1] and sum("foreach" in o for o in launched[0]) <= 20
    assert many.reads == 0


@pytest.mark.parametrize("method", WHOLE)
def test_an_accelerators_step_reads_nothing_back(method, monkeypatch):
    monkeypatch.setattr(tensors, "HOST", frozenset())
    assert counted(method, 3, steps=3).reads == 0


def test_an_accelerators_step_holds_one_copy_of_the_weights(monkeypatch):
    monkeypatch.setattr(tensors, "HOST", frozenset())
    model_bytes = sum(p.nbytes for p in network(10).parameters())
    assert model_bytes <= counted("ssam", 10, steps=3).allocated < 1.1 * model_bytes


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_scores_of_samples_cost_what_the_step_has_not_the_data_set(size):
    """AUSAM's second step allocates for its own samples only; the two tables of scores are written in place."""
    state = MethodState()
    for step in range(2):
        with Counter() as counter:
            average_rise(torch.tensor([3, 1, 3]), torch.tensor([0.5, 1.0, 1.5]), state, size)
            state.commit(torch.tensor(True))
        assert step == 0 or counter.allocated < 2_000
    assert state.plain("samples.count")[[1, 3]].tolist() == [2.0, 4.0]
    assert state.plain("samples.mean")[[1, 3]].tolist() == [1.0, 1.0]


def _is_view(name: str) -> bool:
    return name in ("aten::detach", "aten::view", "aten::select.int", "aten::unbind.int", "aten::alias")
