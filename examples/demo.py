"""What `make demo` shows: a real model fine-tuned with Stable SAM on real data, and what that costs.

    python examples/demo.py [--flags of run_text_classification.py]

The run is `configs/tasks/trec.yaml`, through the same script that a user would call, into `out/demo`, which every demo
empties first. Its figures are read from where the Trainer writes them; only the time a step takes, against the plain
optimizer, is measured here.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import run_text_classification
from hf_ssam import TwoPass
from hf_ssam.run_folder import read_run
from support import offline
from support.cli import run

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tasks" / "trec.yaml"
OWN_FOLDER = Path("out/demo")
TIMED_STEPS = 10
QUESTION = "Who wrote the first symphony ?"


def main() -> None:
    """Train by the configuration, then print before and after, the cost of a step, and what to do next."""
    shutil.rmtree(OWN_FOLDER, ignore_errors=True)
    results = run_text_classification.main([str(CONFIG), "--output_dir", str(OWN_FOLDER), *sys.argv[1:]])
    folder = Path(results["output_dir"])
    before = next(entry["eval_accuracy"] for entry in read_run(folder).log if "eval_accuracy" in entry)
    plain, ssam = step_seconds(folder)
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    call = f"pipeline('text-classification', '{folder}')('{QUESTION}')"
    print(
        f"""
Test accuracy on TREC questions, 6 classes:
  before  {before:.4f}   (MiniLM-L6 with a classifier that knows nothing yet)
  after   {results["eval_accuracy"]:.4f}   ({results["train_runtime"]:.0f} seconds of training)

A step with SSAM takes {ssam:.2f} s, with the plain optimizer {plain:.2f} s: {ssam / plain:.1f} times as long.
(Medians of {TIMED_STEPS} interleaved steps on this machine: a rough figure. Two passes instead of one.)

The model is in {folder}. Ask it:
  {python} -c "from transformers import pipeline; print({call})"

Next, train the baseline and compare:
  {python} examples/run_text_classification.py {CONFIG.relative_to(ROOT)} \\
      --optim adamw_torch --output_dir {folder}-adamw_torch"""
    )


def step_seconds(folder: Path) -> tuple[float, float]:
    """Median seconds of one AdamW step and of one SSAM step on the same batch, measured in turns."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).train()
    texts = offline.trec()["train"][:32]
    batch = AutoTokenizer.from_pretrained(folder)(texts["text"], padding=True, return_tensors="pt")
    labels = torch.tensor(texts["label"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    two_pass = TwoPass(model, method="ssam")

    def forward_backward() -> torch.Tensor:
        loss = model(**batch, labels=labels).loss
        loss.backward()
        return loss.detach()

    def seconds(compute_gradient: Callable[[], object]) -> float:
        start = time.perf_counter()
        compute_gradient()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    def turn() -> tuple[float, float]:
        return seconds(forward_backward), seconds(lambda: two_pass.step(forward_backward))

    turn()  # the first step also allocates the optimizer's state
    plain, ssam = zip(*(turn() for _ in range(TIMED_STEPS)), strict=True)
    return statistics.median(plain), statistics.median(ssam)


if __name__ == "__main__":
    run(main)
