"""The curvature in a run's log: right numbers, no trace in the run, a bounded and logged cost."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from hf_ssam import SSAMTrainer
from hf_ssam.sharpness import Objective, edge_of_stability, top_eigenvalues
from hf_ssam.trainer.sharpness_callback import SharpnessCallback
from tests.support.cases import (
    ONE_PASS_CASES,
    OWN_OPTIMIZER_CASES,
    Case,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    each_case,
    gpt2,
    image_data,
    lm_data,
    resnet,
    text_data,
)
from tests.support.cases import weights as copied

CHEAP = {"max_products": 7, "trace_samples": 3}
"""Limits of a measurement whose values need not have converged."""


def measured(model, args, data, **limits) -> tuple[SSAMTrainer, SharpnessCallback, list[dict]]:
    """Train with the callback; return its log entries."""
    trainer = SSAMTrainer(model=model, args=args, train_dataset=data)
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, SharpnessCallback)
    ]
    callback = SharpnessCallback(trainer, **limits)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback, [e for e in trainer.state.log_history if "sharpness/products" in e]


def sgd(**given):
    return arguments(**{"base_optim": "sgd", "sharpness_steps": 2, "rho": 0.1, "learning_rate": 0.05, **given})


@pytest.mark.slow
def test_measures_before_the_first_step_and_every_sharpness_steps():
    _, _, entries = measured(bert(), sgd(max_steps=5), text_data())
    assert [e["step"] for e in entries] == [0, 2, 4]


@pytest.mark.slow
def test_the_eigenvalue_is_that_of_the_model_on_the_probe():
    trainer, callback, entries = measured(bert(), sgd(max_steps=1, sharpness_steps=1), text_data())
    expected = top_eigenvalues(trainer.model, callback._probe, tol=1e-4, loss=trainer.compute_loss).values[0]
    assert entries[-1]["sharpness/top_eigenvalue"] == pytest.approx(expected, rel=1e-3)
    assert entries[-1]["sharpness/converged"] == 1.0
    assert sum(len(b["labels"]) for b in callback._probe) == 32


@pytest.mark.parametrize(
    "make, data",
    [
        (lambda: bert(0.3), text_data()),
        (resnet, image_data()),
        pytest.param(gpt2, lm_data(), marks=pytest.mark.slow),
    ],
)
def test_the_run_does_not_see_it(make, data):
    watched, plain = make(), make()
    measured(watched, sgd(max_steps=4), data, **CHEAP)
    trainer = SSAMTrainer(model=plain, args=sgd(max_steps=4, sharpness_steps=None), train_dataset=data)
    trainer.train()
    assert_identical(copied(watched), copied(plain))


@each_case
@pytest.mark.slow
@pytest.mark.few_methods
def test_every_method_can_be_watched(case):
    _, _, entries = measured(bert(), case_arguments(case, sharpness_steps=1, max_steps=1), text_data(16))
    assert 0 <= entries[0]["sharpness/ascent_grad_alignment"] <= 1 + 1e-6
    assert entries[0]["sharpness/products"] <= 60


REST = (
    *(Case("sparse_sam", {"mask": mask}) for mask in ("fisher", "dynamic")),
    *ONE_PASS_CASES[:1], *OWN_OPTIMIZER_CASES, Case("esam"), Case("ausam"),
)  # fmt: skip


@pytest.mark.quick("momentum_sam")
@pytest.mark.parametrize("case", REST, ids=lambda c: c.id)
def test_ascent_gradient_is_left_out_where_the_gradient_does_not_tell_the_perturbation(case):
    _, _, entries = measured(bert(), case_arguments(case, sharpness_steps=1, max_steps=1), text_data(16), **CHEAP)
    told = case.method != "momentum_sam" and case.options.get("mask") != "fisher"
    assert [("sharpness/ascent_grad_alignment" in e, e["sharpness/gradients"]) for e in entries] == [
        (told, 2 if told else 1)
    ] * 2


def test_rho_is_that_of_the_next_perturbed_step():
    """Perturbed are steps 1 and 4 of 6, with a radius that falls; at the end it is the last one's."""
    seen = []

    class Watched(SharpnessCallback):
        def measure(self):
            seen.append(self._rho())

    args = sgd(max_steps=6, sharpness_steps=1, ascent_start=1, ascent_interval=3, rho_scheduler_type="linear")
    trainer = SSAMTrainer(model=bert(), args=args, train_dataset=text_data())
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, SharpnessCallback)
    ]
    trainer.add_callback(Watched(trainer))
    trainer.train()
    first, second = trainer.rho_at(1), trainer.rho_at(4)
    assert (first, second) == pytest.approx((0.1 * 5 / 6, 0.1 * 2 / 6))
    assert seen == [first, first, second, second, second, second, second]


@pytest.mark.slow
def test_ascent_gradient_is_taken_at_the_methods_perturbation():
    trainer, callback, entries = measured(bert(), sgd(optim="sam"), text_data())
    objective = Objective(trainer.model, callback._probe)
    g = objective.gradient()
    vector = objective.flat(top_eigenvalues(trainer.model, callback._probe, tol=1e-5, vectors=True).vectors[0])
    ascended = objective.gradient(0.1 * g / g.norm())
    last = entries[-1]
    assert last["sharpness/grad_norm"] == pytest.approx(g.norm().item(), rel=1e-5)
    assert last["sharpness/grad_alignment"] == pytest.approx(_cosine(g, vector), abs=1e-3)
    assert last["sharpness/ascent_grad_alignment"] == pytest.approx(_cosine(ascended, vector), abs=1e-3)


def _cosine(a, b) -> float:
    return (torch.dot(a, b) / (a.norm() * b.norm())).abs().item()


@pytest.mark.quick("ssam-None-*")
@pytest.mark.parametrize(
    "optim, optim_args, name, normalize",
    [
        ("sam", None, "sam", True),
        ("usam", None, "usam", True),
        ("ssam", None, "ssam", True),
        ("ssam", "normalize=false", "ssam", False),
        ("sam", "renormalize=true", "ssam", True),
    ],
)
def test_edges_are_the_predicted_ones(optim, optim_args, name, normalize):
    args = sgd(optim=optim, optim_args=optim_args, lr_scheduler_type="constant")
    trainer, callback, entries = measured(bert(), args, text_data(), **CHEAP)
    last = entries[-1]
    value, norm = last["sharpness/top_eigenvalue"], last["sharpness/grad_norm"]
    objective = Objective(trainer.model, callback._probe)
    g = objective.gradient()
    ascended = objective.gradient(0.1 * (g / g.norm() if normalize and optim != "usam" else g))
    scale = norm / ascended.norm().item() if name == "ssam" else None
    expected = edge_of_stability(0.05, 0.1, norm, name, scale=scale, normalize=normalize)
    assert last["sharpness/edge"] == pytest.approx(expected.edge, rel=1e-4)
    assert last["sharpness/stability"] == pytest.approx(expected.stability(value), rel=1e-4)
    assert last["sharpness/edge_gd"] == pytest.approx(2 / 0.05)
    assert last["sharpness/stability_usam"] == pytest.approx(0.05 * value * (1 + 0.1 * value))


@pytest.mark.slow
def test_an_unknown_edge_is_not_guessed():
    _, _, entries = measured(bert(), sgd(optim="asam"), text_data())
    assert "sharpness/edge" not in entries[0]
    assert "sharpness/edge_gd" in entries[0]


@pytest.mark.slow
def test_a_stock_optimizer_has_no_second_gradient():
    _, _, entries = measured(bert(), arguments(optim="sgd", sharpness_steps=2), text_data())
    assert entries[0]["sharpness/edge"] == entries[0]["sharpness/edge_gd"]
    assert "sharpness/ascent_grad_alignment" not in entries[0]
    assert entries[0]["sharpness/gradients"] == 1


def test_cost_is_bounded_and_logged():
    _, _, entries = measured(bert(), sgd(), text_data(), **CHEAP)
    for entry in entries:
        assert entry["sharpness/products"] <= 7
        assert entry["sharpness/gradients"] == 2
        assert entry["sharpness/seconds"] > 0
        assert entry["sharpness/converged"] == 0.0


@pytest.mark.slow
def test_edges_that_do_not_bind_are_named_once(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    measured(bert(), sgd(base_optim="adamw_torch"), text_data())
    logging.disable_propagation()
    said = [r.message for r in caplog.records if "hold for SGD without momentum, not for AdamW" in r.message]
    assert len(said) == 1


@pytest.mark.slow
def test_entries_go_through_the_trainers_log():
    class Seen(TrainerCallback):
        entries = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.entries.append(dict(logs))

    trainer = SSAMTrainer(
        model=bert(), args=sgd(max_steps=1, sharpness_steps=1), train_dataset=text_data(16), callbacks=[Seen()]
    )
    trainer.train()
    assert any("sharpness/top_eigenvalue" in e for e in Seen.entries)


@pytest.mark.slow
def test_label_smoothing_is_part_of_the_loss():
    plain, smoothed = (
        measured(bert(), sgd(label_smoothing_factor=s, max_steps=1), text_data())[2][0] for s in (0.0, 0.3)
    )
    assert plain["sharpness/top_eigenvalue"] != pytest.approx(smoothed["sharpness/top_eigenvalue"], rel=1e-2)


def test_sharded_weights_are_refused():
    trainer = SSAMTrainer(model=bert(), args=sgd(sharpness_steps=None), train_dataset=text_data())
    trainer.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match="sharpness_steps: curvature cannot be measured on sharded weights"):
        SharpnessCallback(trainer)
