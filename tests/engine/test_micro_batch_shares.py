"""What a micro-batch counts for: its share of the batch, undone before an unnormalised ascent and kept in the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_ssam import SSAMTrainer, TwoPass
from tests.engine.test_two_pass import loss_of, regression
from tests.support import reference
from tests.support.cases import Case, bert, case_arguments, gpt2, lm_data, text_data

RHO = 0.3


def by_hand(model: nn.Module, losses: list[Callable[[], Tensor]], shares: list[float], rho: float = RHO) -> Tensor:
    """`Σ s_i ∇L_i(w + ρ ∇L_i(w))`: each micro-batch climbs along its own mean gradient and counts by its share."""
    w = reference.flat(model.parameters())
    gradients = [reference.gradient_of(model, loss) for loss in losses]
    d = sum(s * gradient(w + rho * gradient(w)) for gradient, s in zip(gradients, shares, strict=True))
    reference.load(model, w)
    return d


def weighted(model: nn.Module, loss: Callable[[], Tensor], share: float) -> Callable[[], Tensor]:
    def run() -> Tensor:
        value = share * loss()
        value.backward()
        return value

    return run


def handed_on(model: nn.Module) -> Tensor:
    return reference.flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("shares", [(0.25, 0.75), (0.5, 0.5), (0.9, 0.3)])
def test_each_micro_batch_ascends_as_if_alone_and_counts_by_its_share(shares, scale):
    model, batches = regression()
    losses = [lambda b=b: loss_of(model, b) for b in batches[:2]]
    expected = by_hand(model, losses, list(shares))
    engine = TwoPass(model, "usam", RHO, scope="micro_batch")
    engine.begin(scale)
    for loss, share in zip(losses, shares, strict=True):
        engine.first_pass(weighted(model, loss, share * (scale or 1.0)), share)
    engine.finish()
    torch.testing.assert_close(handed_on(model) / (scale or 1.0), expected, rtol=1e-11, atol=1e-14)


class Switched(nn.Module):
    """A common layer and one head for each kind of batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.common = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def loss(self, batch: tuple[Tensor, Tensor], kind: int) -> Tensor:
        return nn.functional.mse_loss(self.heads[kind](torch.tanh(self.common(batch[0]))), batch[1])


@pytest.mark.parametrize("kinds", [(0, 1), (1, 0), (0, 1, 0)])
def test_a_parameter_that_later_micro_batches_do_not_use_keeps_its_gradient(kinds):
    model = Switched().double()
    batches = regression()[1]
    losses = [lambda b=b, k=k: model.loss(b, k) for b, k in zip(batches, kinds, strict=False)]
    share = 1 / len(kinds)
    expected = by_hand(model, losses, [share] * len(kinds))
    TwoPass(model, "usam", RHO, scope="micro_batch").step([weighted(model, loss, share) for loss in losses])
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    torch.testing.assert_close(handed_on(model), expected, rtol=1e-11, atol=1e-14)


def llama() -> nn.Module:
    set_seed(1)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


class Recording(SSAMTrainer):
    """Remembers what it trained on, and the number of items that the parent counted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[dict, Tensor | None]] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(({**inputs}, num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


def one_step(build: Callable[[], nn.Module], rows: list, case: Case, **given) -> tuple[nn.Module, Tensor, list]:
    """The model before, the gradient that plain SGD took in one step, and the micro-batches."""
    before, model = build().double(), build().double()
    args = case_arguments(case, max_steps=1, learning_rate=1.0, max_grad_norm=0.0, **given)
    trainer = Recording(model=model, args=args, train_dataset=rows)
    trainer.train()
    d = reference.flat(before.parameters()) - reference.flat(model.parameters())
    return before, d, trainer.seen


def labels_of(inputs: Mapping[str, Tensor]) -> int:
    """How many labels the mean loss of a causal language model runs over."""
    return int(inputs["labels"][:, 1:].ne(-100).sum())


def counted(task: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`num_items_in_batch` as the Trainer counts it for a micro-batch alone: for GPT-2 with the first of each row."""
    labels = {"llama": inputs["labels"][..., 1:], "gpt2": inputs["labels"]}.get(task)
    return {} if labels is None else {"num_items_in_batch": labels.ne(-100).sum()}


TASKS = {"llama": (llama, lm_data()), "gpt2": (gpt2, lm_data()), "bert": (lambda: bert(0.0), text_data())}


@pytest.mark.filterwarnings("ignore:.*its loss ignores it")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", [{"gradient_accumulation_steps": 2}, {"num_micro_batches": 2}])
def test_the_trainer_undoes_the_share_of_the_labels_before_the_ascent(task, split):
    """Unnormalised, and with unequal numbers of labels: e is ρ times the gradient that the Trainer takes alone."""
    build, rows = TASKS[task]
    size = 3 if "gradient_accumulation_steps" in split else 6
    given = {"ascent_scope": "micro_batch", "per_device_train_batch_size": size, **split}
    before, d, seen = one_step(build, rows, Case("usam", rho=RHO), **given)
    if "num_micro_batches" in split:
        ((whole, items),) = seen
        seen = [({n: t[rows] for n, t in whole.items()}, items) for rows in (slice(0, 3), slice(3, 6))]
    counts = [counted(task, inputs) for inputs, _ in seen]
    losses = [lambda i=inputs, n=n: before(**i, **n).loss for (inputs, _), n in zip(seen, counts, strict=True)]
    shares = [float(n.get("num_items_in_batch", 3) / (items or 6)) for (_, items), n in zip(seen, counts, strict=True)]
    if task != "bert":
        assert shares[0] != shares[1]
    torch.testing.assert_close(d, by_hand(before, losses, shares), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("task", ["llama", "gpt2"])
def test_the_trainer_lets_a_part_of_a_micro_batch_stand_for_its_labels(task):
    """ESAM's second pass runs on half of each micro-batch: its mean counts for the labels of the whole."""
    build, rows = TASKS[task]
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    before, d, seen = one_step(build, rows, Case("esam", {"beta": 1.0, "gamma": 0.5}, rho=RHO), **given)
    w = reference.flat(before.parameters())
    shares = [float(labels_of(inputs) / items) for inputs, items in seen]
    g = sum(s * gradient(before, inputs)(w) for (inputs, _), s in zip(seen, shares, strict=True))
    ahead = w + RHO * g / g.norm()
    expected = torch.zeros_like(w)
    for (inputs, _), share in zip(seen, shares, strict=True):
        parts = [{n: t[i : i + 1] for n, t in inputs.items()} for i in range(4)]
        rises = [loss_at(before, ahead, part) - loss_at(before, w, part) for part in parts]
        most = torch.stack(rises).topk(2).indices
        half = {n: t[most] for n, t in inputs.items()}
        assert labels_of(half) * 2 != labels_of(inputs)
        expected += share * gradient(before, half)(ahead)
    torch.testing.assert_close(d, expected, rtol=1e-5, atol=1e-7)


def gradient(model: nn.Module, inputs: Mapping[str, Tensor]) -> reference.Gradient:
    return reference.gradient_of(model, lambda: model(**inputs).loss)


def loss_at(model: nn.Module, w: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    reference.load(model, w)
    with torch.no_grad():
        return model(**inputs).loss
