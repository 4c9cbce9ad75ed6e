"""The methods that look at single samples, take one pass or bring an optimizer, through what `CASES` goes through.

They cannot be in `CASES`: their passes run on parts of a batch, so "two passes, the same on both" is not their law.
What is theirs too (buffers, precision, accumulation, a second pass that dies, the cost) is shown through the Trainer.
"""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from hf_ssam import METHODS, SSAMTrainer
from tests.support.cases import (
    ADAPTER_CASES,
    CASES,
    MAIN_ONE_PASS_CASES,
    OWN_OPTIMIZER_CASES,
    Case,
    MendedTrainer,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    image_data,
    resnet,
    text_data,
    trained,
    weights,
)

SELECTING = (Case("esam"), Case("ausam"))
MASKING = (
    Case("sparse_sam", {"update_freq": 2, "num_samples": 4}),
    Case("sparse_sam", {"update_freq": 2, "mask": "dynamic"}),
    Case("sparse_sam", {"structure": "tensor", "num_samples": 4}),
)
REST = (*SELECTING, *MASKING, *MAIN_ONE_PASS_CASES, *OWN_OPTIMIZER_CASES)
rest = pytest.mark.parametrize("case", REST, ids=lambda c: c.id)
PASSES = {"esam": 1.5, "ausam": 1.0, **{c.method: 1.0 for c in MAIN_ONE_PASS_CASES}}
"""Passes a step at the options above; 2 elsewhere, and 4 samples of 16 at a refresh of a Fisher mask."""


def test_every_method_of_the_table_is_put_to_the_shared_cases():
    assert {c.method for c in (*CASES, *REST, *ADAPTER_CASES)} == set(METHODS)


def buffers(model: torch.nn.Module) -> dict:
    return {n: b.detach().clone() for n, b in model.named_buffers()}


@pytest.mark.slow
@rest
def test_batch_norm_moves_once_a_micro_batch(case: Case):
    """As under the stock Trainer for one step; where the one forward sees half of the samples, or noisy weights, only
    the count holds."""
    given = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    stock = trained(resnet(), arguments(TrainingArguments, optim="sgd", **given), image_data(), cls=MendedTrainer)
    ours = trained(resnet(), case_arguments(case, **given), image_data())
    moved, expected = buffers(ours.model), buffers(stock.model)
    counted = [n for n in moved if n.endswith("num_batches_tracked")]
    assert counted and all(moved[n] == 2 for n in counted)
    if case.method in ("ausam", "random_perturbation"):
        assert any(not torch.equal(moved[n], expected[n]) for n in moved)
    else:
        assert_identical(moved, expected)


@pytest.mark.quick("esam", "sparse_sam-*-num_samples=4", "stale_sam", "adasam")
@rest
def test_the_weights_come_back_when_the_second_pass_fails_and_training_goes_on(case: Case):
    model = bert(0.0)
    trainer = SSAMTrainer(model=model, args=case_arguments(case, max_steps=3), train_dataset=text_data())
    before, failed = [weights(model)], []
    step = trainer.training_step

    def noted(*given):
        before.append(weights(model))
        return step(*given)

    def fail_where_perturbed(module, *_):
        if not failed and any(not torch.equal(p, before[-1][n]) for n, p in module.named_parameters()):
            failed.append(trainer.state.global_step)
            raise RuntimeError("out of memory")

    trainer.training_step = noted
    hook = model.register_forward_pre_hook(fail_where_perturbed)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    # What looks back perturbs from its second step on: there is nothing to look at before.
    assert failed == ([1] if case.method in ("momentum_sam", "stale_sam") else [0])
    assert_identical(before[-1], weights(model))
    hook.remove()
    again = bert(0.0)
    again.load_state_dict(before[-1], strict=False)  # it has buffers that are not saved
    expected = trained(again, case_arguments(case, max_steps=3), text_data()).model
    trainer.training_step = step
    trainer.train()
    assert_identical(weights(expected), weights(model))


@pytest.mark.slow
@rest
def test_accumulation_costs_what_the_formula_says(case: Case):
    """Sixteen samples a step as 8 × 2: the log carries the true number of passes, a Fisher mask's included."""
    args = case_arguments(case, max_steps=4, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer = trained(bert(0.0), args, text_data())
    passes = [entry["ssam/passes"] for entry in trainer.state.log_history if "ssam/passes" in entry]
    each = PASSES.get(case.method, 2.0)
    expected = [each] * 4
    if case.options.get("num_samples"):
        every = case.options.get("update_freq", 100)
        expected = [each + 4 / 16 if step % every == 0 else each for step in range(4)]
    assert passes == pytest.approx(expected)
    assert trainer.state.log_history[-1]["ssam/total_passes"] == pytest.approx(sum(expected))
    assert not torch.equal(trainer.model.classifier.weight, bert(0.0).classifier.weight)


@pytest.mark.quick("ausam", "sparse_sam-*-mask=dynamic", "momentum_sam", "adasam")
@rest
def test_accumulated_micro_batches_are_one_batch_where_no_sample_is_picked(case: Case):
    """Law 4, to rounding; what picks samples picks within each micro-batch, so there it is another draw."""
    given = {"max_steps": 4, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}
    whole = trained(bert(0.0).double(), case_arguments(case, **given), text_data())
    given |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    halves = trained(bert(0.0).double(), case_arguments(case, **given), text_data())
    gap = max((p - q).abs().max() for p, q in zip(whole.model.parameters(), halves.model.parameters(), strict=True))
    assert gap > 1e-6 if case in SELECTING else gap < 1e-6


@pytest.mark.slow
@rest
def test_bf16_autocast_sees_the_perturbed_weights(case: Case):
    """Under autocast the run is near the float32 one, and not the one that an unperturbed second pass would give."""
    runs = {
        name: trained(bert(0.0), case_arguments(case, max_steps=3, rho=rho, bf16=bf16), text_data()).model
        for name, rho, bf16 in (("float32", 0.5, False), ("bf16", 0.5, True), ("unperturbed", 1e-30, True))
    }
    assert all(p.dtype == torch.float32 for p in runs["bf16"].parameters())
    flat = {name: torch.cat([p.detach().flatten() for p in m.parameters()]) for name, m in runs.items()}
    near = (flat["bf16"] - flat["float32"]).norm()
    assert near < 0.5 * (flat["bf16"] - flat["unperturbed"]).norm()
