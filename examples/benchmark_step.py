"""What does a step cost? Times every method's step against a plain one, and against its passes alone.

    python examples/benchmark_step.py                                       # 22.7M parameters, batch 16 × 32, ssam
    python examples/benchmark_step.py --sizes tiny base --shapes 16x32 32x64 --methods ssam sam looksam esam
    python examples/benchmark_step.py --peer_path sam.py --official_path ssam/sam.py     # beside other people's code
    python examples/benchmark_step.py --device cuda --bf16 --shapes 128x128

The limit of a step of two passes is two bare passes and one step of the optimizer; of another one, as many passes as
it takes. All loops take turns within each round, in an order that changes, in one process and on the same weights (the
learning rate is 0), so that a slow moment of the machine slows all of them; a ratio is one round's time over the same
round's. A number is the median of the ratios with their quartiles. A round is five steps, LookSAM's period. The
Trainer's row is measured against a stock Trainer that is made to run two passes.

Ctrl-C ends the measurement and keeps the rounds that are whole. pytorch_optimizer's SAM is measured where that package
is installed.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.optim import AdamW
from tqdm.auto import tqdm
from transformers import set_seed

from hf_ssam import METHODS
from support.step_loops import ADAMW, Loop, bare, our_trainer, ours, peers, plain, stock_trainer
from support.step_meters import copy_bandwidth, traced
from support.step_models import SIZES, Setting, setting
from support.step_report import NOT_TRACED, Measured, Row, plot, row, table, write_csv

PERIOD = 5
"""Steps in a round: LookSAM's default k."""

SSAM_BYTES = 40
"""What an SSAM step must move for a float32 parameter beyond its passes: read g and ĝ for their norms (8); read w and
g, write w + e and the copy of w (16); read the copy and write w (8); read and write ĝ to scale it (8)."""

COPIED = 256 * 2**20
"""Bytes of the buffer that tells the machine's bandwidth: no cache holds it."""


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure what the command line asks for, print a table for each model and batch, and write all of them."""
    flags = arguments().parse_args(argv)
    torch.set_num_threads(flags.threads or torch.get_num_threads())
    bandwidth = copy_bandwidth(COPIED, flags.device)
    rows: list[Row] = []
    for name in flags.sizes if flags.model is None else [flags.model]:
        for shape in flags.shapes:
            set_seed(0)
            at = setting(name, shape, flags.device, flags.bf16, flags.lora_r)
            found, whole = measured(loops(at, flags), flags)
            about = description(name, at, flags, bandwidth)
            here = [row(found, loop, about, PERIOD) for loop in found]
            rows += here
            print(report(here), flush=True)
            if flags.output is not None:
                flags.output.mkdir(parents=True, exist_ok=True)
                write_csv(rows, flags.output / "step_cost.csv")
                plot(rows, flags.output / "step_cost.png")
            if not whole:
                return rows
    return rows


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="threads on the CPU")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--offload_snapshot", action="store_true", help="keep the copy of the weights on the host")
    parser.add_argument("--output", type=Path, help="the folder for step_cost.csv and step_cost.png")
    return parser


def loops(at: Setting, flags: argparse.Namespace) -> list[Loop]:
    """All that is compared; what has no optimizer of its own shares one."""
    optimizer = AdamW(at.trained, **ADAMW)
    found = [plain(at, optimizer), bare(at, optimizer)]
    found += [ours(at, optimizer, method, flags.offload_snapshot) for method in flags.methods]
    found += peers(at, flags.peer_path, flags.official_path)
    if flags.trainer_methods:
        found += [stock_trainer(at), *(our_trainer(at, method) for method in flags.trainer_methods)]
    return found


def measured(all_loops: list[Loop], flags: argparse.Namespace) -> tuple[dict[str, Measured], bool]:
    """The rounds of each loop, and whether there are as many as asked for.

    Raises:
        KeyboardInterrupt: the first round was cut off.
    """
    taken: list[dict[str, tuple[float, float]]] = []
    order, whole = random.Random(0), True
    try:
        for number in tqdm(range(-1, flags.rounds), desc="rounds", leave=False):
            turn = {loop.name: loop.run(PERIOD) for loop in order.sample(all_loops, len(all_loops))}
            if number >= 0:  # the first one warms caches and allocators up
                taken.append(turn)
    except KeyboardInterrupt:
        whole = False
        if not taken:
            raise
    return {loop.name: collected(loop, taken, flags.device) for loop in all_loops}, whole


def collected(loop: Loop, taken: list[dict[str, tuple[float, float]]], device: str) -> Measured:
    """A loop's rounds, and what one more of them does; a Trainer's setting up would be traced with it, and is not."""
    seconds, passes = (np.array(values) / PERIOD for values in zip(*(turn[loop.name] for turn in taken), strict=True))
    return Measured(loop, seconds, passes, traced(lambda: loop.run(PERIOD), device) if loop.traceable else NOT_TRACED)


def description(name: str, at: Setting, flags: argparse.Namespace, bandwidth: float) -> dict[str, object]:
    """The fields of a row that say what was measured, and where."""
    batch, length = at.batch["input_ids"].shape
    return {
        "model": name,
        "parameters": sum(p.numel() for p in at.model.parameters()),
        "trained": sum(p.numel() for p in at.trained),
        "batch": batch,
        "length": length,
        "device": torch.cuda.get_device_name() if flags.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": "bfloat16 autocast" if flags.bf16 else "float32",
        "copy_gb_per_second": bandwidth / 1e9,
    }


def report(rows: list[Row]) -> str:
    """A title, the table, and what an SSAM step's limit is."""
    r = rows[0]
    where = r.device if r.device != "cpu" else f"cpu, {r.threads} thread(s)"
    title = (
        f"\n{r.model}: {r.parameters:,} parameters, of which {r.trained:,} train; batch {r.batch} × {r.length}, "
        f"{r.precision}, {r.rounds} rounds of {PERIOD} steps, {where}; a copy moves {r.copy_gb_per_second:.1f} GB/s"
    )
    floor = 1e3 * SSAM_BYTES * r.trained / (r.copy_gb_per_second * 1e9)
    ends = [
        f"{own.loop}: {own.beyond_ms:.1f} ms beyond its passes, of which the limit is {floor:.1f} ms "
        f"({SSAM_BYTES} bytes a parameter)"
        for own in rows
        if own.loop == "ssam"
    ]
    return "\n".join([title, table(rows), *ends])


if __name__ == "__main__":
    main()
