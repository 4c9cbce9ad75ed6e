"""A run of a method that scores samples, which keeps what each micro-batch was told of them."""

from __future__ import annotations

from typing import Any

from hf_ssam import SSAMTrainer
from hf_ssam.trainer.sample_ids import ID
from tests.support.cases import arguments, bert, text_data, trained

LOADERS = {
    "as it comes": {},
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True},
    "dispatched and split": {"dispatch_batches": True, "split_batches": True},
}
DATA = text_data(20)


class Seen(SSAMTrainer):
    """Keeps the indices and the rows of each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ids, self.rows = [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.ids.append(inputs[ID])
        self.rows.append(inputs["input_ids"])
        return super().training_step(model, inputs, num_items_in_batch)


def ausam(**given: Any) -> Seen:
    args = arguments(optim="ausam", max_steps=-1, num_train_epochs=2, **given)
    return trained(bert(), args, DATA, Seen)
