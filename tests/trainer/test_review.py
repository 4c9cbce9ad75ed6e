"""What a reviewer broke once, kept mended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_ssam import SSAMTrainer, TwoPass
from hf_ssam.rules.tensors import parts
from tests.support.cases import Case, arguments, bert, case_arguments, each_case, text_data, trained, weights


def run_of(model: nn.Module, x: torch.Tensor, factor: float = 1.0):
    def run() -> torch.Tensor:
        loss = factor * model(x).square().mean()
        loss.backward()
        return loss

    return run


def test_momentum_sam_perturbs_only_what_perturb_selects():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    engine, seen = TwoPass(model, "momentum_sam", 0.5, perturb="norm"), []
    model[0].register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    model[1].register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    for _ in range(2):
        model.zero_grad()
        engine.step(run_of(model, torch.randn(4, 3)))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


def test_a_plateau_scheduler_trains():
    args = arguments(
        optim="ssam", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", rho_scheduler_type="lr"
    )
    entry = trained(bert(), args, text_data(), eval_dataset=text_data(8)).state.log_history[0]
    assert entry["ssam/perturbation_norm"] == pytest.approx(0.05, rel=1e-5)


def test_ausam_scores_the_samples_of_each_part():
    args = case_arguments(Case("ausam", {"alpha": 0.5}), ascent_scope="micro_batch", num_micro_batches=2, max_steps=8)
    trainer = trained(bert(0.0), args, text_data())
    assert trainer.state.global_step == 8


def test_a_micro_batch_with_nothing_to_learn_adds_nothing():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    engine = TwoPass(model, "usam", 0.1, scope="micro_batch")
    engine.begin()
    engine.first_pass(run_of(model, x), torch.tensor(1.0))
    engine.first_pass(run_of(model, x, factor=0.0), torch.tensor(0.0))
    report = engine.finish()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    TwoPass(model, "usam", 0.1).step(run_of(model, x))
    assert not report.skipped
    for a, p in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


@each_case
@pytest.mark.few_methods
def test_the_direction_is_let_go_before_the_second_pass(case: Case):
    import gc
    import weakref

    torch.manual_seed(0)
    model, kept, alive = nn.Linear(64, 32), [], []
    engine = TwoPass(model, case.method, case.rho, free_snapshot=True, **case.options)
    rules = engine._gradients._rules
    rule = rules.ascent

    def watched(v, context):
        u = rule(v, context)
        kept.extend(weakref.ref(t) for t in parts(u)[0].values())
        return u

    object.__setattr__(rules, "ascent", watched)

    def run() -> torch.Tensor:
        gc.collect()
        alive.append(sum(r() is not None for r in kept))
        return run_of(model, torch.ones(2, 64))()

    engine.step(run)
    assert kept
    if rules.stateful or rules.keeps_gradient:
        assert alive[-1] <= len(kept)  # an average, or the gradient, may be the direction itself
    else:
        assert alive[-1] == 0


def test_parts_with_a_loss_function_of_the_users_own_are_refused():
    args = arguments(optim="ssam", ascent_scope="micro_batch", num_micro_batches=2)
    with pytest.raises(ValueError, match="num_micro_batches: 2 cannot be used with compute_loss_func"):
        SSAMTrainer(model=bert(), args=args, train_dataset=text_data(), compute_loss_func=lambda o, y, **k: o.loss)


def test_a_loss_is_asked_again_once_it_matters():
    trainer = trained(bert(0.0), arguments(optim="ssam"), text_data())
    trainer.args.gradient_accumulation_steps = 2
    with pytest.warns(UserWarning, match="its loss ignores it"):
        trainer.train()
    assert trainer.state.log_history[0]["loss"] < 1.5


def test_a_state_of_another_method_is_refused():
    engine = TwoPass(nn.Linear(2, 2), "friendly_sam")
    with pytest.raises(ValueError, match="state: it is of method `friendly_sam` and this engine runs `vasso`"):
        TwoPass(nn.Linear(2, 2), "vasso").load_state_dict(engine.state_dict())


def test_indices_are_given_for_every_pass():
    model = nn.Linear(3, 1)
    runs = [run_of(model, torch.ones(2, 3))] * 2
    with pytest.raises(ValueError, match="samples: got 1 tensors of indices for 2 passes"):
        TwoPass(model, "sam").step(runs, samples=torch.arange(2))


class TwoSteps(torch.optim.SGD):
    def first_step(self):
        """Perturb."""

    def second_step(self):
        """Step."""


def test_a_wrapper_given_as_a_class_is_refused():
    trainer = SSAMTrainer(
        model=bert(), args=arguments(), train_dataset=text_data(), optimizer_cls_and_kwargs=(TwoSteps, {"lr": 0.1})
    )
    with pytest.raises(ValueError, match="optimizers: TwoSteps wraps an optimizer"):
        trainer.train()


@pytest.mark.parametrize("given", ["k=inf", "alpha=inf", "k=1e400"])
def test_infinite_options_are_refused(given):
    with pytest.raises(ValueError, match="is not allowed for method `looksam`"):
        arguments(optim="looksam", optim_args=given)


def test_sharpness_steps_are_checked_with_a_stock_optimizer_too():
    with pytest.raises(ValueError, match="sharpness_steps: 0 is not allowed"):
        arguments(optim="sgd", sharpness_steps=0)


def test_layerwise_steps_survive_a_zero_gradient_in_half_precision():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).half()
    nn.init.zeros_(model[1].weight)
    before = weights(model)
    report = TwoPass(model, "look_layersam", 0.05).step(lambda: run_of(model, torch.ones(1, 2, dtype=torch.float16))())
    assert not report.skipped and torch.equal(before["0.weight"], model[0].weight)
