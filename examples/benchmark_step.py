"""What does a step cost? Times every method's step against a plain one, and against its passes alone.

    python examples/benchmark_step.py                                       # 22.7M parameters, batch 16 × 32, ssam
    python examples/benchmark_step.py --sizes tiny base --shapes 16x32 32x64 --methods ssam sam looksam esam
    python examples/benchmark_step.py --peer_path sam/sam.py --official_path stablesam2024/sam.py   # beside other code
    python examples/benchmark_step.py --device cuda --bf16 --shapes 128x128

The limit of a step of two passes is two bare passes and one step of the optimizer; of another one, as many passes as
it takes; of a method that selects samples, the passes and looks of one of its steps, run alone. All loops take turns
within each round, in an order that changes, in one process and on the same weights (the learning rate is 0), so that a
slow moment of the machine slows all of them; a ratio is one round's time over the same round's. A number is the median
of the ratios, with their quartiles and with its own 95 % interval. On the CPU a watch inside the step tells more:
what it finds beside passes and optimizer varies little. The Trainer's row is measured against a stock Trainer that is
made to run two passes.

Ctrl-C ends the measurement and keeps the rounds that are whole. pytorch_optimizer's SAM is measured where that package
is installed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import AdamW
from transformers import set_seed

from hf_ssam import METHODS
from support.step_loops import ADAMW, Loop, bare, our_trainer, ours, peers, stock_trainer
from support.step_meters import copy_bandwidth
from support.step_models import SIZES, Setting, setting
from support.step_report import Row, description, plot, report, row, write_csv
from support.step_rounds import measured

COPIED = 256 * 2**20
"""Bytes of the buffer that tells the machine's bandwidth: no cache holds it."""


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for, print a table for each model and batch, and write all of them."""
    flags = parsed(argv)
    torch.set_num_threads(flags.threads or torch.get_num_threads())
    bandwidth = copy_bandwidth(COPIED, flags.device)
    rows: list[Row] = []
    for name in flags.sizes if flags.model is None else [flags.model]:
        for shape in flags.shapes:
            set_seed(0)
            at = setting(name, shape, flags.device, flags.bf16, flags.lora_r)
            with at.watch.watching(at.model):
                found, whole = measured(loops(at, flags), flags.rounds, flags.steps, at)
            about = description(name, at, flags.device, "bfloat16 autocast" if flags.bf16 else "float32", bandwidth)
            here = [row(found, loop, about, flags.steps) for loop in found]
            rows += here
            print(report(here, flags.steps), flush=True)
            if flags.output is not None:
                flags.output.mkdir(parents=True, exist_ok=True)
                write_csv(rows, flags.output / "step_cost.csv")
                plot(rows, flags.output / "step_cost.png")
            if not whole:
                return rows
    return rows


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, whose rounds are whole periods of what it measures."""
    parser = arguments()
    flags = parser.parse_args(argv)
    period = 5 if {"looksam", "look_layersam"} & {*flags.methods, *flags.trainer_methods} else 1
    if flags.steps < 1 or flags.steps % period:
        parser.error(f"--steps: {flags.steps} steps are not whole periods of {period}; give a multiple of {period}.")
    return flags


def shape(text: str) -> tuple[int, int]:
    """`16x32` as (16, 32)."""
    batch, length = text.split("x")
    return int(batch), int(length)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["minilm"], choices=list(SIZES), help="4.4M to 335M parameters")
    parser.add_argument("--model", help="a text model in place of --sizes: a folder or a name on the Hub")
    parser.add_argument("--lora_r", type=int, default=0, help="train adapters of this rank (peft); 0: all weights")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(16, 32)], help="samples x tokens, as in 16x32")
    parser.add_argument("--methods", nargs="*", default=["ssam"], choices=list(METHODS))
    parser.add_argument("--trainer_methods", nargs="*", default=["ssam"], choices=list(METHODS))
    parser.add_argument("--peer_path", type=Path, help="sam.py of davda54/sam")
    parser.add_argument("--official_path", type=Path, help="sam.py of cltan023/stablesam2024")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="of a round; LookSAM's period, or fewer without it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="threads on the CPU")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--offload_snapshot", action="store_true", help="keep the copy of the weights on the host")
    parser.add_argument("--time_only", action="store_true", help="count neither memory nor operations")
    parser.add_argument("--output", type=Path, help="the folder for step_cost.csv and step_cost.png")
    return parser


def loops(at: Setting, flags: argparse.Namespace) -> list[Loop]:
    """All that is compared; what has no optimizer of its own shares one."""
    optimizer = AdamW(at.trained, **ADAMW)
    found = [bare(at, optimizer, passes) for passes in (1, 2)]
    found += [loop for method in flags.methods for loop in ours(at, optimizer, method, flags.offload_snapshot)]
    found += peers(at, flags.peer_path, flags.official_path)
    if flags.trainer_methods:
        found += [stock_trainer(at), *(our_trainer(at, m, flags.offload_snapshot) for m in flags.trainer_methods)]
    return [replace(loop, traceable=loop.traceable and not flags.time_only) for loop in found]


if __name__ == "__main__":
    main()
