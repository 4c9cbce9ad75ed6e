"""What is orthogonal is kept, and what rounding leaves of a parallel vector is not: tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import TwoPass
from hf_ssam.rules.context import StepContext
from hf_ssam.rules.descent import orthogonal
from hf_ssam.rules.space import ParameterSpace

Vector = dict[str, Tensor]


def rest_of(v: Vector, to: Vector) -> Vector:
    params = {n: nn.Parameter(torch.zeros_like(t)) for n, t in v.items()}
    found = orthogonal(v, to, StepContext(ParameterSpace(params), {}, {}, torch.zeros(()), 0.1))
    return {n: found[n] for n in found}


def flat(v: Vector) -> Tensor:
    return torch.cat([t.double().flatten() for t in v.values()])


def mixed(coarse: float, angle: float, seed: int = 0) -> tuple[Vector, Vector]:
    """A unit vector in float32 and one at `angle` from it, beside one bfloat16 tensor of length `coarse` in both."""
    torch.manual_seed(seed)
    a, b = torch.randn(2, 500)
    a, b = a / a.norm(), (b - (b @ a) / (a @ a) * a)
    small = torch.randn(20)
    small = (coarse * small / small.norm()).bfloat16()
    v = {"fine": torch.cos(torch.tensor(angle)) * a + torch.sin(torch.tensor(angle)) * b / b.norm(), "coarse": small}
    return {"fine": a, "coarse": small.clone()}, v


@pytest.mark.parametrize("angle", [0.02, 0.1])
def test_one_coarse_tensor_does_not_hide_what_the_others_resolve(angle):
    """2 % and 10 % of ‖v‖: an eighth, the noise of bfloat16, is that of the one tensor, not of the model."""
    to, v = mixed(coarse=0.01, angle=angle)
    rest, x, y = flat(rest_of(v, to)), flat(v), flat(to)
    expected = x - (x @ y) / (y @ y) * y
    assert expected.norm() < x.norm() / 8
    assert rest.norm() > 0
    torch.testing.assert_close(rest, expected, rtol=0.02, atol=1e-4)


def test_noise_of_a_coarse_tensor_is_no_direction():
    """The same vector rounded twice: what is left is below an eighth of the bfloat16 tensor, the longest here."""
    to, v = mixed(coarse=10.0, angle=0.0)
    v["coarse"] = (v["coarse"].float() * 1.003).bfloat16()
    assert all(t.abs().max() == 0 for t in rest_of(v, to).values())


class Mixed(nn.Module):
    """A float32 model with one bfloat16 scale, as some keep their norms or adapters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale.float())


@pytest.mark.parametrize("method", ["looksam", "gsam"])
def test_a_model_with_one_bfloat16_tensor_has_an_orthogonal_part(method):
    model, x = Mixed(), torch.randn(16, 6)

    def run() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    options = {"looksam": {"k": 2, "alpha": 0.5}, "gsam": {"alpha": 0.5}}[method]
    engine = TwoPass(model, method, 0.02, **options)
    report = engine.step(run)
    if method == "looksam":
        kept = flat(engine.state_dict()["memory"]["orthogonal"])
        assert 0 < kept.norm() < report.ascent_grad_norm / 8
        return
    d = flat({n: p.grad for n, p in model.named_parameters()})
    model.zero_grad()
    TwoPass(model, "sam", 0.02).step(run)
    assert not torch.equal(d, flat({n: p.grad for n, p in model.named_parameters()}))
