"""An Accelerate loop with gradient accumulation: one `TwoPass.step` takes all micro-batches of an optimizer step.

`accelerator.accumulate` has no place here: the second pass needs the whole window again.
"""

from functools import partial
from itertools import islice

from accelerate import Accelerator

from hf_ssam import TwoPass


def train(model, optimizer, loader, steps, accumulate=4, method="ssam", rho=0.05):
    """Train for `steps` optimizer steps; returns the report of each."""
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    two_pass = TwoPass(model, method=method, rho=rho)

    def forward_backward(batch):
        loss = model(**batch).loss / accumulate  # the micro-batch's share
        accelerator.backward(loss)
        return loss

    reports = []
    model.train()
    batches = iter(loader)
    for window in islice(iter(lambda: list(islice(batches, accumulate)), []), steps):
        reports.append(two_pass.step([partial(forward_backward, batch) for batch in window]))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return reports
