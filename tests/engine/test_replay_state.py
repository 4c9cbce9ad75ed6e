"""State that a forward moves other than plain buffers: it moves once a step, and pass 2 sees what pass 1 saw."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.engine.module_state import FrozenParameters
from hf_ssam.engine.replay import unchanged

TINY = 1e-30
"""A radius too small to change any weight: the run is then that of the plain optimizer, to the bit."""


class Student(nn.Module):
    """A linear layer, trained towards what `target` makes of the same batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def target(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) - self.target(x)).square().mean()


class Teacher(Student):
    """A teacher of frozen weights, a moving average that each forward moves before it uses it (MoCo, BYOL, DINO)."""

    def __init__(self, start: int = 0):
        super().__init__()
        self.teacher = nn.Linear(4, 3).requires_grad_(False)
        self.start, self.calls = start, 0

    def move(self, t: nn.Parameter, s: nn.Parameter) -> None:
        with torch.no_grad():
            t.mul_(0.9).add_(s, alpha=0.1)

    def target(self, x: Tensor) -> Tensor:
        for t, s in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
            self.move(t, s)
        return self.teacher(x)


class DataTeacher(Teacher):
    """As official codes write it: through `.data`, which no version counter sees."""

    def move(self, t: nn.Parameter, s: nn.Parameter) -> None:
        t.data.mul_(0.9).add_(s.data, alpha=0.1)


class ReplacedTeacher(Teacher):
    """A new tensor in `.data` each time."""

    def move(self, t: nn.Parameter, s: nn.Parameter) -> None:
        t.data = t.data * 0.9 + s.data * 0.1


class Expanded(Student):
    """A buffer of one number, seen four times."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(3))

    def target(self, x: Tensor) -> Tensor:
        self.scale = (self.scale[:1] + 1).expand(3)
        return self.scale.expand(len(x), 3)


class Counter(Student):
    """A Python counter, shown by torch's own hooks for state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state

    def target(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return torch.full((len(x), 3), float(self.calls[0]))


class Draws(Student):
    """A generator of its own."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]):
        super().__init__()
        self.generator, self.draw = generator, draw

    def target(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 3), self.draw(self.generator))


MODELS: dict[str, Callable[[], Student]] = {
    "teacher": Teacher,
    "data_teacher": DataTeacher,
    "replaced_teacher": ReplacedTeacher,
    "expanded_buffer": Expanded,
    "counter": Counter,
    "torch_generator": lambda: Draws(torch.Generator().manual_seed(3), lambda g: torch.rand((), generator=g).item()),
    "numpy_generator": lambda: Draws(np.random.default_rng(3), lambda g: g.random()),
    "numpy_random_state": lambda: Draws(np.random.RandomState(3), lambda g: g.rand()),
    "python_generator": lambda: Draws(random.Random(3), lambda g: g.random()),
}


def trajectory(model: Student, rho: float | None, steps: int = 4, **given: Any) -> list[Tensor]:
    """Losses and weights of SGD over two micro-batches a step: plain, or in two passes."""
    engine = None if rho is None else TwoPass(model, "sam", rho, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        optimizer.zero_grad()

        def run(x: Tensor) -> Tensor:
            loss = model(x) / 2
            loss.backward()
            return loss

        batches = [torch.randn(5, 4, generator=generator) for _ in range(2)]
        if engine is None:
            seen += [sum(run(x).detach() for x in batches)]
        else:
            report = engine.step([lambda x=x: run(x) for x in batches])
            assert report.ascent_loss == report.loss, "at one point both passes see the same function"
            seen += [report.loss]
        optimizer.step()
        seen += [p.detach().clone() for p in model.parameters()]
    return seen


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
@pytest.mark.parametrize("name", MODELS)
def test_state_moves_once_a_step(name: str, scope: str):
    plain, ours = trajectory(MODELS[name](), None), trajectory(MODELS[name](), TINY, scope=scope)
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if scope == "micro_batch" else 0)


def test_frozen_weights_are_copied_after_the_first_step_only_where_they_moved():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)])
    frozen = FrozenParameters(model)
    saved = frozen.save()
    model[1].bias.data.add_(1)
    assert [c.numel() for c in saved.copies.values()] == [12, 3]
    frozen.notice(saved)
    assert [c.numel() for c in frozen.save().copies.values()] == [3]


def test_frozen_base_larger_than_what_trains_is_not_copied():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(40, 3).requires_grad_(False)])
    assert not FrozenParameters(model).save().copies


def test_late_teacher_moves_once_a_step_too():
    """A teacher of a large model that begins to move in the second step: told by its tensors' versions."""

    class Late(Teacher):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(40, 40).requires_grad_(False)
            self.batches = 0

        def move(self, t, s):
            if self.started:
                super().move(t, s)

    def run_steps(two_passes: bool) -> Tensor:
        model = Late()
        engine = TwoPass(model, "sam", TINY)
        for step in range(3):
            model.started = step > 0

            def run() -> Tensor:
                loss = model(torch.ones(2, 4))
                loss.backward()
                return loss

            model.zero_grad()
            engine.step(run) if two_passes else run()
        return model.teacher.weight

    torch.testing.assert_close(run_steps(True), run_steps(False), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_look_that_must_not_be_seen_moves_nothing(name: str):
    model, fresh = MODELS[name](), MODELS[name]()
    with unchanged(model), torch.no_grad():
        model(torch.ones(2, 4))
    for a, b in zip(trajectory(model, None, steps=1), trajectory(fresh, None, steps=1), strict=True):
        assert torch.equal(a, b)


def test_private_generator_draws_anew_without_replay():
    model = MODELS["torch_generator"]()
    engine = TwoPass(model, "sam", TINY, replay_rng=False)

    def run() -> Tensor:
        loss = model(torch.ones(2, 4))
        loss.backward()
        return loss

    report = engine.step(run)
    assert report.loss != report.ascent_loss
