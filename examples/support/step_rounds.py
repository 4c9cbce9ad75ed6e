"""Rounds in which all loops take turns, so that a slow moment of the machine slows all of them."""

import random

import numpy as np
from tqdm.auto import tqdm

from support.step_loops import Loop, Taken
from support.step_meters import traced
from support.step_models import Setting
from support.step_report import NOT_TRACED, Measured


def measured(loops: list[Loop], rounds: int, steps: int, at: Setting) -> tuple[dict[str, Measured], bool]:
    """The rounds of so many steps of each loop, and whether there are as many as asked for.

    Raises:
        KeyboardInterrupt: the first round was cut off.
    """
    taken: list[dict[str, Taken]] = []
    order, whole = random.Random(0), True
    try:
        for number in tqdm(range(-1, rounds), desc="rounds", leave=False):
            turn = {loop.name: its_turn(loop, steps, at) for loop in order.sample(loops, len(loops))}
            if number >= 0:  # the first one warms caches and allocators up
                taken.append(turn)
    except KeyboardInterrupt:
        whole = False
        if not taken:
            raise
    return {loop.name: collected(loop, taken, steps, at) for loop in loops}, whole


def its_turn(loop: Loop, steps: int, at: Setting) -> Taken:
    """So many steps of a loop, whatever the one before it has left."""
    at.unshare()
    return loop.run(steps)


def collected(loop: Loop, taken: list[dict[str, Taken]], steps: int, at: Setting) -> Measured:
    """A loop's rounds, and what one more of them does; a Trainer's setting up would be traced with it, and is not."""
    each = (np.array(values) / steps for values in zip(*(turn[loop.name] for turn in taken), strict=True))
    at.unshare()
    return Measured(loop, *each, traced(lambda: loop.run(steps), at.device) if loop.traceable else NOT_TRACED)
