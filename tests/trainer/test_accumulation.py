"""One optimizer step over several micro-batches: the whole batch is one batch, or each ascends by itself (law 4)."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_ssam import SSAMTrainer, TwoPass
from tests.support import reference
from tests.support.cases import (
    CASES,
    MAIN_CASES,
    Case,
    assert_close,
    bert,
    case_arguments,
    each_case,
    gpt2,
    lm_data,
    text_data,
    trained,
    weights,
)

TASKS = {"gpt2": (gpt2, lm_data), "bert": (lambda: bert(dropout=0.0), text_data)}
WHOLE = {"per_device_train_batch_size": 8}
SPLITS = {
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}
MENDED = "its loss ignores it"


def run(case: Case, task: str, samples: int = 64, **given) -> nn.Module:
    model, data = TASKS[task]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{MENDED}")
        return trained(model(), case_arguments(case, **{"max_steps": 10, **given}), data(samples)).model


_WHOLE: dict[tuple[str, str], dict[str, Tensor]] = {}


def whole(case: Case, task: str) -> dict[str, Tensor]:
    """The weights after 10 steps of batch 8, trained once for all tests here."""
    key = (case.id, task)
    if key not in _WHOLE:
        _WHOLE[key] = weights(run(case, task, **WHOLE))
    return _WHOLE[key]


class Recording(SSAMTrainer):
    """Remembers the micro-batches of each optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows: list[list[dict]] = [[]]

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.windows[-1].append({**inputs})
        if self.accelerator.sync_gradients:
            self.windows.append([])
        return super().training_step(model, inputs, num_items_in_batch)


@each_case
@pytest.mark.few_methods
def test_two_micro_batches_are_one_batch(case: Case):
    assert_close(weights(run(case, "gpt2", **SPLITS["4x2"])), whole(case, "gpt2"))


@pytest.mark.quick("ssam", "friendly_sam")
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_a_mended_loss_is_one_batch_too(case: Case):
    """BERT's loss ignores the number of items that the Trainer hands it."""
    task = "bert"
    assert_close(weights(run(case, task, **SPLITS["4x2"])), whole(case, task))


@pytest.mark.quick("ssam", "looksam-k=2")
@pytest.mark.parametrize("case", MAIN_CASES, ids=lambda c: c.id)
def test_eight_micro_batches_are_one_batch(case: Case):
    assert_close(weights(run(case, "gpt2", **SPLITS["1x8"])), whole(case, "gpt2"))


@pytest.mark.quick("ssam-bert", "usam-gpt2")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", [Case("ssam"), Case("usam")], ids=lambda c: c.id)
def test_a_last_shorter_window_is_one_batch(case: Case, task: str):
    """20 samples, batch 4, accumulation 2: windows of 8, 8 and 4 samples, as batch 8 has them."""
    given = {"samples": 20, "max_steps": -1, "num_train_epochs": 3}
    assert_close(weights(run(case, task, **SPLITS["4x2"], **given)), weights(run(case, task, **WHOLE, **given)))


def test_the_ascent_follows_the_whole_batch_not_the_last_micro_batch():
    """The equalities above would hold for a method that never perturbs; this one does, and mSAM differs."""
    whole = run(Case("sam"), "gpt2", **WHOLE)
    for other in (
        run(Case("sam", rho=0.0), "gpt2", **WHOLE),
        run(Case("sam"), "gpt2", **SPLITS["4x2"], ascent_scope="micro_batch"),
    ):
        assert max((a - b).abs().max() for a, b in zip(whole.parameters(), other.parameters(), strict=True)) > 1e-4


@pytest.mark.quick("4x2")
@pytest.mark.parametrize("split", SPLITS)
def test_label_smoothing_accumulates_too(split: str):
    given = {"label_smoothing_factor": 0.1}
    assert_close(
        weights(run(Case("ssam"), "gpt2", **SPLITS[split], **given)),
        weights(run(Case("ssam"), "gpt2", **WHOLE, **given)),
    )


def own_loss(model: nn.Module, batch: dict[str, Tensor], items: Tensor | None) -> Tensor:
    """The loss of a micro-batch alone, as the Trainer defines it: over the items that it counts."""
    return model(**batch).loss if items is None else model(**batch, num_items_in_batch=items).loss


# LookSAM counts optimizer steps where its reference counts calls, so micro-batches have no common meaning.
ON_EACH_CALL = tuple(c for c in CASES if not c.method.startswith("look"))


@pytest.mark.few_methods("usam")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", ON_EACH_CALL, ids=lambda c: c.id)
def test_micro_batch_is_msam(case: Case, task: str):
    """mSAM (arXiv 2302.09693) in float64: each micro-batch its own e and γ, then the mean weighted by its items."""
    model, data = TASKS[task]
    if not case.ascends_alone:
        with pytest.raises(ValueError, match="ascent_scope: method `.*` hands on one vector from step to step"):
            trained(model(), case_arguments(case, ascent_scope="micro_batch"), data(20))
        return
    args = case_arguments(
        case,
        ascent_scope="micro_batch",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=6,
        learning_rate=0.05,
        **SPLITS["4x2"],
    )
    start = model().double()
    w, mask = reference.flat(p for p in start.parameters() if p.requires_grad), reference.weight_mask(start)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{MENDED}")
        trainer = trained(model().double(), args, data(20), cls=Recording)
    windows = [window for window in trainer.windows if window]
    assert [len(window) for window in windows] == [2, 2, 1, 2, 2, 1]
    start.train()
    unequal, state = False, {}
    for window in windows:
        items = [trainer._get_num_items_in_batch([batch], torch.device("cpu")) for batch in window]
        sizes = [len(batch["labels"]) if n is None else int(n) for batch, n in zip(window, items, strict=True)]
        unequal |= len(set(sizes)) > 1
        d = torch.zeros_like(w)
        for batch, n, size in zip(window, items, sizes, strict=True):
            gradient = reference.gradient_of(start, lambda b=batch, n=n: own_loss(start, b, n))
            own = reference.REFERENCES[case.method](gradient, w, state, case.rho, is_weight=mask, **case.options)
            d += size / sum(sizes) * own
        w = w - 0.05 * d
    assert unequal == (task == "gpt2"), "token shares must differ, or their weights are not tested"
    got = reference.flat(p for p in trainer.model.parameters() if p.requires_grad)
    # Losses of Transformers models pass through float32: reference and run share its digits, not float64's.
    torch.testing.assert_close(got, w, atol=1e-7, rtol=0)


@pytest.mark.quick("ssam-bert", "usam-gpt2")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", [Case("ssam"), Case("usam")], ids=lambda c: c.id)
def test_rank_scope_of_one_process_is_global(case: Case, task: str):
    assert_close(weights(run(case, task, ascent_scope="rank", **SPLITS["4x2"])), whole(case, task))


@each_case
def test_a_loop_that_hands_over_a_list_sees_one_batch(case: Case):
    """TwoPass alone, float64: a list of halves with losses already halved is the whole batch."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def backward(model, x, y, weight):
        def call():
            loss = weight * nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return call

    halves, whole = network(), network()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    a = TwoPass(halves, case.method, case.rho, **case.options).step(
        [backward(halves, x[:4], y[:4], 0.5), backward(halves, x[4:], y[4:], 0.5)]
    )
    b = TwoPass(whole, case.method, case.rho, **case.options).step(backward(whole, x, y, 1.0))
    for p, q in zip(halves.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.ascent_loss, b.ascent_loss)
