"""The table: every row builds, every option is checked, and each method reduces to the simpler one bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from hf_ssam import METHODS, SSAMTrainingArguments, TwoPass, get_method
from tests.engine.test_two_pass import backward_of, loss_of, regression, sgd_with_engine
from tests.support import reference
from tests.support.cases import (
    CASES,
    ONE_PASS_CASES,
    WHOLE_MODEL,
    Case,
    arguments,
    assert_identical,
    bert,
    case_arguments,
    text_data,
    trained,
    weights,
)

REDUCTIONS = [
    ("friendly_sam", {"sigma": 0.0}, "sam"),
    ("vasso", {"theta": 1.0}, "sam"),
    ("looksam", {"k": 1}, "sam"),
    ("gsam", {"alpha": 0.0}, "sam"),
    ("wsam", {"gamma": 0.5}, "sam"),
    ("wsam", {"gamma": 0.0}, "plain"),
    ("sam", {"renormalize": True}, "ssam"),
    ("usam", {"renormalize": True}, "ssam-usam"),
]
TARGETS = {
    "sam": ("sam", 0.1, {}),
    "ssam": ("ssam", 0.1, {}),
    "plain": ("sam", 0.0, {}),
    "ssam-usam": ("ssam", 0.1, {"normalize": False}),
}


def after_ten_steps(method: str, rho: float, options: dict) -> dict:
    model, batches = regression()
    sgd_with_engine(model, TwoPass(model, method, rho, **options), batches, lr=0.1)
    return weights(model)


@pytest.mark.parametrize(("method", "options", "target"), REDUCTIONS)
def test_a_method_reduces_to_the_simpler_one_bit_for_bit(method, options, target):
    assert_identical(after_ten_steps(method, 0.1, options), after_ten_steps(*TARGETS[target]))


@pytest.mark.parametrize("case", (*CASES, *ONE_PASS_CASES), ids=lambda case: case.id)
def test_without_a_radius_a_method_is_one_plain_pass_and_keeps_nothing(case: Case):
    model, batches = regression()
    engine = TwoPass(model, case.method, 0.0, **case.options)
    reports = sgd_with_engine(model, engine, batches, lr=0.1)
    assert_identical(weights(model), after_ten_steps("sam", 0.0, {}))
    assert {r.passes for r in reports} == {1.0}
    assert engine.clock.steps == 0 and engine.state_dict()["memory"] == {}


@pytest.mark.parametrize("case", (*CASES, *ONE_PASS_CASES), ids=lambda case: case.id)
def test_a_restored_state_goes_on_bit_for_bit(case: Case):
    model, batches = regression()
    engine = TwoPass(model, case.method, case.rho, **case.options)
    sgd_with_engine(model, engine, batches[:5], lr=0.1)
    again, _ = regression()
    again.load_state_dict(model.state_dict())
    resumed = TwoPass(again, case.method, case.rho, **case.options)
    resumed.load_state_dict(engine.state_dict())
    sgd_with_engine(model, engine, batches[5:], lr=0.1)
    sgd_with_engine(again, resumed, batches[5:], lr=0.1)
    assert_identical(weights(model), weights(again))


@pytest.mark.parametrize("case", (*CASES, *ONE_PASS_CASES), ids=lambda case: case.id)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_overflow_leaves_the_state_as_if_the_step_had_not_been(case: Case, at):
    def state_after(overflow: bool) -> dict:
        model, batches = regression()
        engine = TwoPass(model, case.method, case.rho, **case.options)
        for step, batch in enumerate(batches[:4]):
            if overflow and step == at:
                steps = engine.clock.steps
                bad = (batch[0] * float("inf"), batch[1])
                assert engine.step(backward_of(model, bad)).skipped
                model.zero_grad()
                engine.clock.steps = steps
            engine.step(backward_of(model, batch))
            model.zero_grad()
        return engine.state_dict()["memory"]

    clean, survived = state_after(False), state_after(True)
    assert clean.keys() == survived.keys()
    for slot in clean:
        assert_identical(clean[slot], survived[slot])


def test_the_one_pass_methods_follow_their_references():
    for case in ONE_PASS_CASES:
        model, batches = regression()
        expected_model, _ = regression()
        losses = [lambda b=batch, m=expected_model: loss_of(m, b) for batch in batches]
        expected = reference.sgd(case.method, expected_model, losses, case.rho, lr=0.1, **case.options)
        reports = sgd_with_engine(model, TwoPass(model, case.method, case.rho, **case.options), batches, lr=0.1)
        torch.testing.assert_close(reference.flat(model.parameters()), expected, rtol=1e-10, atol=1e-13)
        assert {r.passes for r in reports} == {1.0}


@pytest.mark.parametrize("method", ["momentum_sam", "stale_sam"])
def test_what_looks_back_perturbs_by_rho_from_its_second_step_on(method: str):
    model, batches = regression()
    reports = sgd_with_engine(model, TwoPass(model, method, 0.1), batches, lr=0.1)
    assert reports[0].perturbation_norm == 0
    torch.testing.assert_close(reports[1].perturbation_norm, torch.tensor(0.1).double())


def passes_counted(case: Case, steps: int) -> tuple[int, float]:
    model, batches = regression()
    calls = []

    def counted(batch):
        run = backward_of(model, batch)
        return lambda: (calls.append(1), run())[1]

    engine = TwoPass(model, case.method, case.rho, **case.options)
    passes = 0.0
    for batch in batches[:steps]:
        passes += engine.step(counted(batch)).passes
        model.zero_grad()
    return len(calls), passes


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("sam"), 20),
        (Case("looksam", {"k": 5}), 12),
        (Case("looksam", {"k": 2}), 15),
        (Case("look_layersam", {"k": 5}), 12),
        (Case("momentum_sam"), 10),
        (Case("random_perturbation"), 10),
        (Case("stale_sam"), 10),
        (Case("functional_sam"), 20),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_passes_are_what_the_formula_says(case: Case, expected):
    """LookSAM: (1 + 1/k) passes a step; Momentum-SAM: one."""
    assert passes_counted(case, 10) == (expected, expected)


def test_one_pass_weights_come_back_when_the_pass_fails():
    model, batches = regression()
    engine = TwoPass(model, "momentum_sam", 0.5)
    engine.step(backward_of(model, batches[0]))
    model.zero_grad()
    before = weights(model)

    def fails():
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step(fails)
    assert_identical(before, weights(model))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("looksam", {"k": 0}, "k=0 is not allowed for method `looksam`; choose an integer from 1"),
        ("looksam", {"alpha": -1}, "alpha=-1 is not allowed"),
        ("friendly_sam", {"lam": 1.0}, "lam=1.0 is not allowed"),
        ("friendly_sam", {"ema_order": "both"}, "choose one of code, paper"),
        ("vasso", {"theta": 0.0}, "theta=0.0 is not allowed for method `vasso`; choose a number above 0 up to 1"),
        ("wsam", {"gamma": 1.0}, "gamma=1.0 is not allowed"),
        ("momentum_sam", {"renormalize": True}, "method `momentum_sam` has no option `renormalize`"),
        ("adasam", {"renormalize": True}, "method `adasam` has no option `renormalize`"),
    ],
)
def test_an_option_out_of_range_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        get_method(method, **options)


@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_a_row_of_the_table_is_the_method_with_its_defaults(name):
    gradients = []
    for method in (name, METHODS[name], get_method(name)):
        model, batches = regression()
        batch = batches[0]

        def run(indices=slice(None), model=model, batch=batch):
            loss = loss_of(model, (batch[0][indices], batch[1][indices]))
            loss.backward()
            return loss

        losses = {"per_sample_loss": lambda inputs, outputs: outputs.square().mean(1)}
        engine = TwoPass(model, method, 0.1, dataset_size=6, **losses)
        engine.step(run, samples=torch.arange(6))
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert_identical(gradients[0], gradients[1])
    assert_identical(gradients[0], gradients[2])


def test_options_beside_a_chosen_method_are_refused():
    with pytest.raises(ValueError, match="k: a Method has its options chosen; pass them to get_method"):
        TwoPass(regression()[0], get_method("looksam"), k=1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "sam",
            {"max_scale": 0.5},
            "max_scale=0.5 has no effect .*; drop it, or choose renormalize=True",
        ),
        ("ssam", {"eta": 3}, "eta=3.0 has no effect .* choose adaptive=True"),
        ("sparse_sam", {"structure": "2:4", "sparsity": 0.9}, "choose structure=element or structure=tensor"),
        ("sparse_sam", {"mask": "dynamic", "num_samples": 7}, "num_samples=7 has no effect .* choose mask=fisher"),
        ("sparse_sam", {"drop_rate": 0.9}, "drop_rate=0.9 has no effect .* choose mask=dynamic"),
    ],
)
def test_an_option_without_effect_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        get_method(method, **options)
    defaults = {n: METHODS[method].options[n].default for n in options}
    assert get_method(method, **defaults).values == get_method(method).values


def test_the_trainer_refuses_an_optimizer_under_adasam():
    with pytest.raises(
        ValueError, match="base_optim: `sgd` cannot be chosen, since adasam brings an optimizer of its own"
    ):
        arguments(optim="adasam", base_optim="sgd")
    with pytest.raises(ValueError, match="drop base_optim and its args"):
        arguments(optim="adasam", base_optim_args="fused=True")


def test_every_paper_can_be_cited():
    for method in METHODS.values():
        assert method.paper.title and method.paper.authors and method.paper.arxiv in method.paper.bibtex


@pytest.mark.quick("momentum_sam", "random_perturbation", "stale_sam")
@pytest.mark.parametrize("case", ONE_PASS_CASES, ids=lambda case: case.id)
def test_the_trainer_logs_what_a_one_pass_method_cost(case: Case):
    trainer = trained(bert(0.0), case_arguments(case, max_steps=4, gradient_accumulation_steps=2), text_data())
    last = trainer.state.log_history[-1]
    assert last["ssam/total_passes"] == 4
    plain = trained(bert(0.0), case_arguments(case, rho=0.0, max_steps=4, gradient_accumulation_steps=2), text_data())
    assert trainer.state.total_flos == plain.state.total_flos


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_the_arguments_take(path, tmp_path):
    """Every value is a field, and every number has its source, or the words that there is none, in a comment."""
    text = path.read_text()
    values = yaml.safe_load(text)
    args = SSAMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **values)
    assert args.is_sharpness_aware and args.method().build() is not None
    assert args.method().paper.arxiv in text or values["optim"] == "sparse_sam"
    for line in text.splitlines():
        if line.startswith(("rho", "learning_rate", "num_micro")):
            assert "#" in line, line


def test_every_method_has_a_config():
    assert {yaml.safe_load(path.read_text())["optim"] for path in CONFIGS} == set(METHODS)
