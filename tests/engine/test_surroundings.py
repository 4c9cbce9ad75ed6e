"""What surrounds a model: another memory layout, a compiler, other threads, a second engine."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from tests.support.cases import MAIN_CASES, Case, assert_close, assert_identical, weights

Batches = list[tuple[Tensor, Tensor]]


def network(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    features = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))
    return nn.Sequential(*features, nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def batches(layout: torch.memory_format = torch.contiguous_format, seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(4)]
    return [(x.to(memory_format=layout), torch.randint(0, 4, (6,), generator=generator)) for x in images]


def trained(model: nn.Module, case: Case | None, data: Batches, called: Callable | None = None, engines: int = 1):
    """SGD with momentum, plain or with engines that take turns; `called` is the model as it is called."""
    called = model if called is None else called
    ours = [TwoPass(called, case.method, case.rho, **case.options) for _ in range(engines if case else 0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def run(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(called(x), y)
        loss.backward()
        return loss

    for step, batch in enumerate(data):
        optimizer.zero_grad()
        ours[step % engines].step(partial(run, *batch)) if ours else run(*batch)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_channels_last_weights_take_the_same_steps(case: Case):
    model = network().to(memory_format=torch.channels_last)
    other = trained(model, case, batches(torch.channels_last))
    assert_close(other, trained(network(), case, batches()), atol=1e-5)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_without_a_perturbation_is_the_plain_optimizer():
    def run(case: Case | None) -> dict[str, Tensor]:
        return trained(network(0.2).to(memory_format=torch.channels_last), case, batches(torch.channels_last))

    assert_identical(run(Case("sam", rho=1e-30)), run(None))


@pytest.mark.parametrize("case", [None, Case("ssam"), Case("gsam"), Case("momentum_sam")], ids=str)
def test_compiled_model_with_batch_norm_and_dropout_takes_the_same_steps(case: Case | None):
    torch._dynamo.reset()
    model = network(0.2)
    torch.manual_seed(5)
    compiled = trained(model, case or Case("sam", rho=1e-30), batches(), torch.compile(model, backend="aot_eager"))
    plain = network(0.2)
    torch.manual_seed(5)
    assert_identical(compiled, trained(plain, case, batches()))


def test_engines_in_threads_do_not_meet():
    """Without random draws, whose generators belong to the process, threads train what each trains alone."""
    cases = [Case("ssam"), Case("friendly_sam"), Case("gsam"), Case("looksam")]
    data = [batches(seed=i) for i in range(len(cases))]
    alone = [trained(network(seed=i), case, data[i]) for i, case in enumerate(cases)]
    models, together = [network(seed=i) for i in range(len(cases))], {}

    def work(i: int) -> None:
        together[i] = trained(models[i], cases[i], data[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert_identical(together[i], expected)


def test_engines_on_one_model_take_turns():
    one = network()
    other = copy.deepcopy(one)
    assert_identical(trained(one, Case("ssam"), batches()), trained(other, Case("ssam"), batches(), engines=2))
