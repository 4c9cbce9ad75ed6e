"""What does a step cost? Times each method's step against the plain one, and its memory, on one model and one device.

    python examples/benchmark_step.py                                         # MiniLM-L6, or --model NAME_OR_FOLDER
    python examples/benchmark_step.py --device cuda --bf16 --batch_size 128   # with memory

Steps of all methods alternate within each round, in one process and on the same weights (the learning rate is 0), so
that a slow moment of the machine slows all of them; a ratio is one round's step over the same round's plain step. A
number is the median of the ratios with their quartiles; methods whose steps differ (LookSAM, Fisher masks) are
averaged over a period first.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, set_seed

from hf_ssam import METHODS, TwoPass
from support import offline

PLAIN = "plain"
PERIOD = 5
"""Steps in a round: LookSAM's default k."""


@dataclass
class Cost:
    """What the rounds of one method came to: seconds and passes a round, and the largest memory of one."""

    seconds: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    peak: int = 0


def main(argv: Sequence[str] | None = None) -> dict[str, Cost]:
    """Measure what the command line asks for, and print a table."""
    flags = arguments().parse_args(argv)
    set_seed(0)
    name = flags.model or str(offline.minilm())
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=6).to(flags.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    engines = {PLAIN: TwoPass(model, "sam", 0.0)} | {m: engine(model, m, flags) for m in flags.methods}
    steps = {m: step_of(model, optimizer, two_pass, flags) for m, two_pass in engines.items()}
    costs = {m: Cost() for m in steps}
    for round_ in tqdm(range(-1, flags.rounds), desc="rounds", leave=False):
        for method, step in steps.items():
            measured = measure(step, flags.device)
            if round_ >= 0:  # the first one warms caches and allocators up
                costs[method].seconds.append(measured[0])
                costs[method].passes.append(measured[1])
                costs[method].peak = max(costs[method].peak, measured[2])
    where = torch.cuda.get_device_name() if flags.device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    shape = f"batch {flags.batch_size} × {flags.length} tokens, {'bfloat16 autocast' if flags.bf16 else 'float32'}"
    print(f"{model.num_parameters():,} parameters, {shape}, {flags.rounds} rounds of {PERIOD} steps, {where}")
    print(table(costs, sum(p.numel() * p.element_size() for p in model.parameters())))
    return costs


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a text model: a folder or a name on the Hub; MiniLM-L6 if not given")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--offload_snapshot", action="store_true", help="keep the copy of the weights on the host")
    return parser


def engine(model: nn.Module, method: str, flags: argparse.Namespace) -> TwoPass:
    """The method with its defaults."""
    return TwoPass(model, method, offload_snapshot=flags.offload_snapshot, dataset_size=flags.batch_size)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, two_pass: TwoPass, flags: argparse.Namespace
) -> Callable[[], float]:
    """`() -> passes`, one optimizer step on random tokens."""
    size = (flags.batch_size, flags.length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, size, generator=generator).to(flags.device)
    labels = torch.randint(0, 6, size[:1], generator=generator).to(flags.device)
    samples = torch.arange(flags.batch_size, device=flags.device)

    def forward_backward(indices: Tensor | slice = slice(None)) -> Tensor:
        with torch.autocast(flags.device, torch.bfloat16, enabled=flags.bf16):
            loss = model(input_ids=ids[indices], labels=labels[indices]).loss
        loss.backward()
        return loss

    def step() -> float:
        report = two_pass.step(forward_backward, samples=samples)
        optimizer.step()
        optimizer.zero_grad()
        return report.passes

    return step


def measure(step: Callable[[], float], device: str) -> tuple[float, float, int]:
    """Of one round: seconds, passes a step, and the bytes it needed at its peak above those it began with.

    The CPU does not count its memory: 0.
    """
    if device == "cpu":
        start = time.perf_counter()
        passes = sum(step() for _ in range(PERIOD)) / PERIOD
        return time.perf_counter() - start, passes, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    seconds, passes, _ = measure(lambda: synchronized(step), "cpu")
    return seconds, passes, torch.cuda.max_memory_allocated() - held


def synchronized(step: Callable[[], float]) -> float:
    """`step`, waited for."""
    passes = step()
    torch.cuda.synchronize()
    return passes


def table(costs: dict[str, Cost], weights: int) -> str:
    """Markdown: passes, time in units of the plain step, and memory in units of the weights."""
    lines = [
        "| method | passes a step | time of a plain step (quartiles) | peak memory / weights |",
        "|---|---|---|---|",
    ]
    plain = np.array(costs[PLAIN].seconds)
    for method, cost in costs.items():
        low, middle, high = np.percentile(np.array(cost.seconds) / plain, [25, 50, 75])
        peak = f"{cost.peak / weights:.1f}" if cost.peak else "–"
        lines.append(f"| {method} | {np.mean(cost.passes):.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
