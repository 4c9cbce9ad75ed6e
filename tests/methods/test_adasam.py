"""AdaSAM's own optimizer against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_ssam import TwoPass
from hf_ssam.methods.adasam import AdaSAM
from tests.engine.test_two_pass import backward_of, regression
from tests.support.cases import arguments, assert_identical, bert, text_data, trained, weights


def by_formula(w, gradients, lr, betas, eps, weight_decay=0.0):
    """Scalar by scalar, in Python's floats."""
    m = v = 0.0
    v_max = eps * eps
    for d in gradients:
        m = betas[0] * m + (1 - betas[0]) * d
        v = betas[1] * v + (1 - betas[1]) * d * d
        v_max = max(v_max, v)
        w = w * (1 - lr * weight_decay) - lr * m / v_max**0.5
    return w


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_follows_its_formula(weight_decay):
    torch.manual_seed(0)
    start, gradients = torch.randn(4).double(), torch.randn(10, 4).double()
    p = nn.Parameter(start.clone())
    optimizer = AdaSAM([p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    expected = [
        by_formula(start[i].item(), gradients[:, i].tolist(), 0.1, (0.8, 0.95), 1e-3, weight_decay) for i in range(4)
    ]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_without_a_radius_it_is_amsgrad_without_bias_correction():
    model, batches = regression()
    expected, _ = regression()
    engine = TwoPass(model, "adasam", 0.0)
    optimizer = AdaSAM(model.parameters(), lr=0.01)
    m, v, v_max = ([torch.full_like(p, x) for p in expected.parameters()] for x in (0.0, 0.0, 1e-16))
    for batch in batches:
        engine.step(backward_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        backward_of(expected, batch)()
        with torch.no_grad():
            for i, p in enumerate(expected.parameters()):
                m[i] = 0.9 * m[i] + 0.1 * p.grad
                v[i] = 0.999 * v[i] + 0.001 * p.grad**2
                v_max[i] = torch.maximum(v_max[i], v[i])
                p -= 0.01 * m[i] / v_max[i].sqrt()
        expected.zero_grad()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_the_first_step_has_its_closed_length():
    p = nn.Parameter(torch.zeros(3).double())
    p.grad = torch.tensor([2.0, -1e-3, 1e-10], dtype=torch.float64)
    AdaSAM([p], lr=0.1).step()
    root = 0.001**0.5
    expected = [-0.1 * 0.1 * g / max(1e-8, root * abs(g)) for g in (2.0, -1e-3, 1e-10)]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_largest_second_moment_never_falls():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(5))
    optimizer, before = AdaSAM([p]), torch.zeros(5)
    for scale in (1.0, 5.0, 0.1, 0.0, 2.0):
        p.grad = scale * torch.randn(5)
        optimizer.step()
        assert (optimizer.state[p]["v_max"] >= before).all()
        before = optimizer.state[p]["v_max"].clone()


def test_moments_stay_in_float32_over_a_restart():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdaSAM([p], lr=0.1)
    p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    again = AdaSAM([nn.Parameter(p.detach().clone())], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    (q,) = again.param_groups[0]["params"]
    assert {t.dtype for t in again.state[q].values()} == {torch.float32}
    assert_identical(optimizer.state[p], again.state[q])
    assert p.dtype == torch.bfloat16


def test_the_trainer_builds_it_with_the_adam_arguments():
    args = arguments(optim="adasam", rho=0.1, adam_beta1=0.8, adam_epsilon=1e-6, weight_decay=0.1)
    trainer = trained(bert(0.0), args, text_data())
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, AdaSAM)
    assert optimizer.defaults["betas"] == (0.8, 0.999) and optimizer.defaults["eps"] == 1e-6
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
    assert not torch.equal(weights(bert(0.0))["classifier.weight"], trainer.model.classifier.weight)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_a_value_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="AdaSAM: .* are not allowed together"):
        AdaSAM([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("eps", [0.0, 1e-30, -1e-8])
def test_an_epsilon_whose_square_float32_does_not_hold_is_refused(eps):
    """ε² = 0 would divide a zero moment by zero."""
    with pytest.raises(ValueError, match="AdaSAM: .* are not allowed together; choose .* eps from 1.1e-19"):
        AdaSAM([torch.nn.Parameter(torch.zeros(2))], eps=eps)
