"""When, how far and over what: rho over time, start and interval, `perturb`, the snapshot in host memory."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ssam import SSAMTrainer, TwoPass
from hf_ssam.trainer.schedules import RHO_SCHEDULES, first_ascent, is_ascent_step, rho_factor
from tests.support.cases import (
    Case,
    assert_identical,
    bert,
    case_arguments,
    each_case,
    gpt2,
    lm_data,
    text_data,
    trained,
    weights,
)

CLOSED_FORMS = {
    "constant": lambda t, steps: 1.0,
    "linear": lambda t, steps: 1 - t / steps,
    "cosine": lambda t, steps: 0.5 * (1 + math.cos(math.pi * t / steps)),
    "polynomial": lambda t, steps: (1 - 1e-7) * (1 - t / steps) + 1e-7,
    "cosine_up": lambda t, steps: 0.5 * (1 - math.cos(math.pi * t / steps)),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_schedules_are_their_closed_forms(name: str):
    factor = rho_factor(name, 20)
    assert [factor(t, 0.5) for t in range(20)] == pytest.approx([CLOSED_FORMS[name](t, 20) for t in range(20)])


def test_the_schedule_tied_to_the_learning_rate_is_its_share():
    assert [rho_factor("lr", 20)(7, share) for share in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert set(RHO_SCHEDULES) == {*CLOSED_FORMS, "lr", "warmup"}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="rho_scheduler_type: `exponential` does not exist; choose one of constant"):
        rho_factor("exponential", 10)


def perturbations(**given) -> list[float | None]:
    """‖e‖ of each step of a `sam` run, where it is ρ to rounding; None where the step did not perturb."""
    trainer = trained(gpt2(), case_arguments(Case("sam", rho=0.2), **given), lm_data())
    return [e.get("ssam/perturbation_norm") for e in trainer.state.log_history if "ssam/loss" in e]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_rho_follows_its_schedule_through_the_trainer(name: str):
    expected = [0.2 * CLOSED_FORMS[name](t, 6) for t in range(6)]
    found = [e or 0.0 for e in perturbations(max_steps=6, rho_scheduler_type=name)]  # without a radius: a plain step
    assert found == pytest.approx(expected, rel=1e-5)


def test_rho_warms_up_with_the_learning_rate_and_stays():
    found = perturbations(max_steps=6, rho_scheduler_type="warmup", warmup_steps=4)
    assert found[0] is None
    assert found[1:] == pytest.approx([0.2 * share for share in (0.25, 0.5, 0.75, 1.0, 1.0)], rel=1e-5)
    found = perturbations(max_steps=6, rho_scheduler_type="warmup", warmup_steps=0.5)
    assert found[1:] == pytest.approx([0.2 * share for share in (1 / 3, 2 / 3, 1.0, 1.0, 1.0)], rel=1e-5)


def test_nothing_to_warm_up_over_is_refused():
    with pytest.raises(ValueError, match="`warmup` grows over warmup_steps, which is 0; set warmup_steps, or choose"):
        perturbations(max_steps=2, rho_scheduler_type="warmup")


def halved_each_step(step: int, steps: int) -> float:
    return 0.5**step


def test_rho_follows_a_function_and_the_arguments_are_saved_with_it():
    args = case_arguments(
        Case("sam", rho=0.2), max_steps=4, rho_scheduler_type=halved_each_step, save_strategy="steps"
    )
    trainer = trained(gpt2(), args, lm_data())
    found = [e["ssam/perturbation_norm"] for e in trainer.state.log_history if "ssam/loss" in e]
    assert found == pytest.approx([0.2 * 0.5**t for t in range(4)], rel=1e-5)
    trainer.save_model(args.output_dir)
    assert "halved_each_step" in args.to_json_string()
    assert pickle.loads(pickle.dumps(args)).rho_scheduler_type is halved_each_step


def falls_below_zero(step: int, steps: int) -> float:
    return 1.0 - step


def test_a_function_that_cannot_be_saved_or_leaves_its_range_is_refused():
    with pytest.raises(ValueError, match="cannot be saved with the run's arguments; define it by `def` at the top"):
        case_arguments(Case("sam"), rho_scheduler_type=lambda step, steps: 1.0)
    with pytest.raises(ValueError, match="rho_scheduler_type: the function gives -1.0 for step 2; return a finite"):
        perturbations(max_steps=4, rho_scheduler_type=falls_below_zero)


def test_rho_follows_the_learning_rate_through_its_warm_up():
    """Warm-up begins at a learning rate of 0: that step is not perturbed, and takes one pass."""
    found = perturbations(max_steps=6, rho_scheduler_type="lr", lr_scheduler_type="linear", warmup_steps=2)
    assert found[0] is None
    assert found[1:] == pytest.approx([0.2 * share for share in (0.5, 1.0, 0.75, 0.5, 0.25)], rel=1e-5)


def groups_of_two_rates(model: nn.Module) -> torch.optim.Optimizer:
    """Two parameter groups whose rates are neither each other's nor that of the arguments."""
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.4}, {"params": rest, "lr": 0.003}])


def test_rho_follows_the_share_of_the_first_groups_own_rate():
    """Each group is measured by the rate that it began with; where they decay apart, the first one counts."""
    shares = [1.0, 0.5, 0.25, 0.125]
    model = gpt2()
    optimizer = groups_of_two_rates(model)
    decays = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1 / (1 + t)])
    args = case_arguments(Case("sam", rho=0.2), max_steps=4, rho_scheduler_type="lr", learning_rate=0.05)
    trainer = trained(model, args, lm_data(), optimizers=(optimizer, decays))
    found = [e["ssam/perturbation_norm"] for e in trainer.state.log_history if "ssam/loss" in e]
    assert found == pytest.approx([0.2 * share for share in shares], rel=1e-5)


@pytest.mark.parametrize(
    "given, perturbed",
    [
        ({"ascent_start": 2}, [2, 3, 4, 5]),
        ({"ascent_start": 0.5}, [3, 4, 5]),
        ({"ascent_interval": 2}, [0, 2, 4]),
        ({"ascent_start": 1, "ascent_interval": 3}, [1, 4]),
    ],
)
def test_only_the_steps_asked_for_are_perturbed(given: dict, perturbed: list[int]):
    trainer = trained(gpt2(), case_arguments(Case("sam"), max_steps=6, **given), lm_data())
    entries = [e for e in trainer.state.log_history if "ssam/passes" in e]
    assert [i for i, e in enumerate(entries) if "ssam/ascent_loss" in e] == perturbed
    assert [e["ssam/passes"] for e in entries] == [2.0 if i in perturbed else 1.0 for i in range(6)]
    assert [e["ssam/perturbed_steps"] for e in entries] == [int(i in perturbed) for i in range(6)]
    assert entries[-1]["ssam/total_passes"] == 6 + len(perturbed)


class StopAfterThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3


def test_until_the_start_a_run_is_that_of_the_base_optimizer():
    plain, ours = (
        trained(bert(), case_arguments(Case("ssam"), max_steps=6, **given), text_data(), callbacks=[StopAfterThree()])
        for given in ({"rho": 0.0}, {"ascent_start": 3})
    )
    assert_identical(weights(ours.model), weights(plain.model))


@pytest.mark.parametrize("start, steps, expected", [(0, 10, 0), (0.25, 10, 2), (0.99, 10, 9), (1, 10, 1), (9, 10, 9)])
def test_the_first_ascent(start: float, steps: int, expected: int):
    assert first_ascent(start, steps) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 100, 365, 1000, 12_345])
def test_a_ratio_is_the_nearest_step(steps: int):
    """Against exact fractions: 0.29 of 100 steps is 29, though the product of the floats is 28.999…; below the end."""
    for hundredths in range(1000):
        exact = Fraction(hundredths, 1000) * steps
        found = first_ascent(hundredths / 1000, steps)
        assert abs(found - exact) <= Fraction(1, 2) or found == steps - 1 < exact, (hundredths, steps)
        assert 0 <= found < steps


@pytest.mark.parametrize("ratio, steps, expected", [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.0, 5, 0)])
def test_a_ratio_that_is_a_whole_step_is_that_step(ratio: float, steps: int, expected: int):
    assert first_ascent(ratio, steps) == expected


def test_ascent_steps_count_from_the_first():
    assert [t for t in range(12) if is_ascent_step(t, 3, 4)] == [3, 7, 11]


def test_a_start_beyond_the_last_step_is_refused_before_the_first_batch():
    class Untouched(list):
        def __getitem__(self, index):
            raise AssertionError("a batch was read")

    trainer = SSAMTrainer(
        model=gpt2(),
        args=case_arguments(Case("ssam"), max_steps=4, ascent_start=4),
        train_dataset=Untouched(lm_data()),
    )
    with pytest.raises(ValueError, match="ascent_start: 4 is step 4 of a run of 4 steps.*choose an earlier step"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------- perturb


def moved(model: nn.Module, method: str, rho: float, perturb: str, **options) -> dict[str, torch.Tensor]:
    """w + e − w of every parameter, as the second pass finds it."""
    before, found = weights(model), []
    batch = lm_data(8)
    inputs = {k: torch.stack([row[k] for row in batch]) for k in batch[0]}

    def run():
        found.append(weights(model))
        loss = model(**inputs).loss
        loss.backward()
        return loss

    report = TwoPass(model, method, rho, perturb=perturb, **options).step(run)
    e = {n: found[1][n] - before[n] for n, _ in model.named_parameters()}
    total = torch.cat([t.reshape(-1) for t in e.values()]).double().norm()
    torch.testing.assert_close(report.perturbation_norm.double(), total, rtol=1e-4, atol=0)
    return e


@pytest.mark.parametrize("perturb", ["all", "norm", r"\.attn\.", "wte"])
def test_the_radius_is_that_of_what_is_perturbed(perturb: str):
    e = moved(gpt2(), "sam", 0.3, perturb)
    total = torch.cat([t.reshape(-1) for t in e.values()]).norm()
    assert float(total) == pytest.approx(0.3, rel=1e-4)
    chosen = {
        "all": lambda n: True,
        "norm": lambda n: ".ln_" in n,
        r"\.attn\.": lambda n: ".attn." in n,
        "wte": lambda n: "wte" in n,
    }[perturb]
    assert {n for n, t in e.items() if t.abs().sum() > 0} == {n for n in e if chosen(n)}


@each_case
def test_a_part_is_perturbed_in_every_method(case: Case):
    e = moved(gpt2(), case.method, 0.3, "norm", **case.options)
    touched = {n for n, t in e.items() if t.abs().sum() > 0}
    assert touched and all(".ln_" in n for n in touched)


def test_ssam_renormalises_over_everything_that_trains():
    """γ = ‖g‖/‖ĝ‖ belongs to the gradient that is handed on, however little of the network was perturbed."""
    model, batch = gpt2(), lm_data(8)
    inputs = {k: torch.stack([row[k] for row in batch]) for k in batch[0]}

    def run():
        loss = model(**inputs).loss
        loss.backward()
        return loss

    report = TwoPass(model, "ssam", 0.3, perturb="norm").step(run)
    d = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().norm()
    torch.testing.assert_close(d, report.grad_norm.double(), rtol=1e-5, atol=0)


def test_norm_layers_of_any_name_are_found():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.BatchNorm1d(2), "c": RMSNorm(), "d": nn.GroupNorm(1, 2)})
    names = TwoPass(model, perturb="norm").perturbed
    assert set(names) == {"b.weight", "b.bias", "c.weight", "d.weight", "d.bias"}


@pytest.mark.parametrize(
    "perturb, message", [("norm", "selects no trainable"), ("lora_", "selects no trainable"), ("(", "not a regular")]
)
def test_a_choice_that_selects_nothing_is_refused(perturb: str, message: str):
    with pytest.raises(ValueError, match=f"perturb: .*{message}"):
        TwoPass(nn.Linear(2, 2), perturb=perturb)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"perturb": "norm"}, {"ascent_scope": "micro_batch"}], ids=str)
@pytest.mark.parametrize("case", [Case("ssam"), Case("asam"), Case("friendly_sam")], ids=lambda c: c.id)
def test_a_snapshot_in_host_memory_changes_no_bit(case: Case, given: dict):
    one, two = (
        trained(bert(), case_arguments(case, max_steps=3, offload_snapshot=offload, **given), text_data())
        for offload in (True, False)
    )
    assert_identical(weights(one.model), weights(two.model))


def test_the_engine_knows_how_far_the_run_is_also_where_steps_are_not_perturbed():
    """A dynamic mask decays over the whole run."""
    args = case_arguments(Case("sparse_sam", {"mask": "dynamic"}), max_steps=4, ascent_start=1, ascent_interval=2)
    trainer = trained(bert(0.0), args, text_data())
    assert (trainer.two_pass.clock.steps, trainer.two_pass.clock.elapsed) == (2, 4)
