"""What the docstrings show works: examples at the prompt are run, and say what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch
from transformers.utils import ModelOutput

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SHOWN = {
    "hf_ssam.engine.two_pass.TwoPass",
    "hf_ssam.sharpness.edges.edge_of_stability",
    "hf_ssam.sharpness.eigenvalues.top_eigenvalues",
}


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_example_of_a_docstring_runs(name, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, prints that it guesses
    module, _, shown = name.rpartition(".")
    found = doctest.DocTestFinder(recurse=False).find(getattr(import_module(module), shown), shown, extraglobs=names())
    assert [test for test in found if test.examples]
    for test in found:
        assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


def names() -> dict:
    """What an example takes for granted: a model that gives its loss, batches, and the parts of a loop."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_a = torch.nn.Parameter(torch.linspace(0.1, 1, 5))

        def forward(self, x, labels):
            return ModelOutput(loss=((x * self.lora_a).sum(-1) - labels).square().mean())

    def forward_backward():
        loss = model(**batch).loss
        loss.backward()
        return loss

    model = Model()
    batch = {"x": torch.arange(15.0).view(3, 5).sin(), "labels": torch.ones(3)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {**locals(), "loader": [batch] * 3}
