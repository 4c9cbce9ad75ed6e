"""The loops that are compared: plain steps, bare passes, ours, other libraries' optimizers, and whole Trainers.

All train the same model on the same batch at learning rate 0, so that they may take turns.
"""

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_ssam import METHODS, SSAMTrainerMixin, SSAMTrainingArguments, TwoPass
from support.step_meters import Clock, Stopwatch
from support.step_models import Setting

PLAIN, LIMIT, TRAINER = "plain step", "two bare passes", "Trainer, two passes"
OURS = "SSAMTrainer, "
RHO = 0.05
ADAMW = {"lr": 0.0, "weight_decay": 0.0}


class Taken(NamedTuple):
    """What steps of a loop took, all of them together.

    Attributes:
        seconds: by the clock.
        passes: over the batch.
        beside: of `seconds`, what is neither passes nor looks nor the optimizer's; NaN on a GPU, for which the host
            does not wait.
    """

    seconds: float
    passes: float
    beside: float


@dataclass(frozen=True)
class Loop:
    """A way to train.

    Attributes:
        name: what the table calls it.
        run: `steps -> what they took`.
        kept: bytes that it adds to a checkpoint: what its optimizer and its method remember.
        baseline: the loop whose cost is the least that this one can cost; None: as many bare passes as it takes.
        traceable: whether `run` does nothing but steps; a Trainer also sets itself up.
    """

    name: str
    run: Callable[[int], Taken]
    kept: Callable[[], int]
    baseline: str | None = None
    traceable: bool = True


def bare(at: Setting, optimizer: Optimizer, passes: int) -> Loop:
    """So many passes and the optimizer's step: what no step that takes as many passes can go below."""
    return alone(PLAIN if passes == 1 else LIMIT, at, optimizer, passes * [at.forward_backward], passes)


def alone(name: str, at: Setting, optimizer: Optimizer, work: list[Callable[[], object]], passes: float) -> Loop:
    """What a step runs, one after the other, then the optimizer's step; between them gradients are dropped."""

    def step() -> float:
        for run in work:
            optimizer.zero_grad()
            run()
        optimizer.step()
        optimizer.zero_grad()
        return passes

    return Loop(name, timed(step, at), lambda: nbytes(optimizer.state_dict()["state"]))


def ours(at: Setting, optimizer: Optimizer, method: str, offload_snapshot: bool = False) -> list[Loop]:
    """`TwoPass` with the method's defaults, and, for a method that selects samples, its passes alone as its limit.

    Half of a batch may cost more than half of a pass, and a forward without gradient more than a third of one.
    """
    two_pass = engine(at, method, offload_snapshot)
    samples = torch.arange(len(at.batch["labels"]), device=at.device)

    def step() -> float:
        report = two_pass.step(at.forward_backward, samples=samples)
        optimizer.step()
        optimizer.zero_grad()
        return report.passes

    def kept() -> int:
        return nbytes(optimizer.state_dict()["state"]) + nbytes(two_pass.state_dict())

    loop = Loop(method, timed(step, at), kept)
    if METHODS[method].build().selection is None:
        return [loop]
    limit = f"{method}, its passes alone"
    passes = alone(limit, at, optimizer, *recorded(at, method))
    return [replace(one, baseline=limit) for one in (passes, loop)]


def engine(at: Setting, method: str, offload_snapshot: bool = False) -> TwoPass:
    """`TwoPass` at the end of a run: what grows over it is grown."""
    size = len(at.batch["labels"])
    two_pass = TwoPass(at.model, method, offload_snapshot=offload_snapshot, dataset_size=size, total_steps=1)
    two_pass.clock.lr = ADAMW["lr"]
    return two_pass


def recorded(at: Setting, method: str) -> tuple[list[Callable[[], object]], float]:
    """What a step of `method` runs, in order: passes, and forwards without gradient. How many passes that is."""
    work: list[Callable[[], object]] = []

    def run_pass(indices: Tensor | slice = slice(None)) -> Tensor:
        work.append(partial(at.forward_backward, indices))
        return at.forward_backward(indices)

    def look(model: torch.nn.Module, args: tuple, inputs: dict[str, Tensor]) -> None:
        if not torch.is_grad_enabled():
            work.append(partial(at.forward, inputs))

    with at.model.register_forward_pre_hook(look, with_kwargs=True):
        report = engine(at, method).step(run_pass, samples=torch.arange(len(at.batch["labels"]), device=at.device))
    at.model.zero_grad()
    return work, report.passes


def wrapping(name: str, at: Setting, optimizer: Optimizer) -> Loop:
    """An optimizer around another one, with `first_step` and `second_step`, as most libraries have it."""

    def step() -> float:
        at.forward_backward()
        optimizer.first_step(zero_grad=True)
        at.forward_backward()
        optimizer.second_step(zero_grad=True)
        return 2.0

    def kept() -> int:
        return nbytes(optimizer.state) + nbytes(optimizer.base_optimizer.state)

    return Loop(name, timed(step, at), kept)


def peers(at: Setting, peer_path: Path | None, official_path: Path | None) -> Iterable[Loop]:
    """What is there of: davda54's SAM, pytorch_optimizer's SAM, the official SSAM code."""
    if peer_path is not None:
        yield wrapping("davda54/sam", at, loaded(peer_path).SAM(at.trained, AdamW, rho=RHO, **ADAMW))
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        from pytorch_optimizer import SAM

        yield wrapping("pytorch_optimizer SAM", at, SAM(at.trained, AdamW, rho=RHO, **ADAMW))
    if official_path is not None:
        optimizer = loaded(official_path).SAM(AdamW(at.trained, **ADAMW), rho=RHO, stable=True)
        yield wrapping("official SSAM", at, optimizer)


def loaded(path: Path) -> Any:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WatchedTrainer(Trainer):
    """The stock Trainer, its passes taken by a watch."""

    watch: Stopwatch

    def training_step(self, *args: Any) -> Tensor:
        with self.watch.running():
            return super().training_step(*args)


class OurTrainer(SSAMTrainerMixin, WatchedTrainer):
    """`SSAMTrainer` over it."""


class TwoPassesTrainer(WatchedTrainer):
    """The stock Trainer, made to take two passes: what `SSAMTrainer` would cost if all we add were free."""

    def training_step(self, model: torch.nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        super().training_step(model, {**inputs}, num_items_in_batch)
        model.zero_grad()
        return super().training_step(model, {**inputs}, num_items_in_batch)


class Timer(TrainerCallback):
    """All steps but the first, which sets a run up.

    Attributes:
        seconds: by the clock.
        watched: of these, what the watch has seen.
    """

    def __init__(self, at: Setting):
        self._clock, self._watch = Clock(at.device), at.watch
        self.seconds = self.watched = 0.0

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._clock.start()
            self.watched = -self._watch.seconds
        if state.global_step == state.max_steps:
            self.seconds = self._clock.stop()
            self.watched += self._watch.seconds


def stock_trainer(at: Setting) -> Loop:
    """`TwoPassesTrainer` over AdamW."""
    trainer = TwoPassesTrainer(args=TrainingArguments(optim="adamw_torch", **trainer_arguments(at)), **data(at))

    def kept() -> int:
        return nbytes(trainer.optimizer.state_dict()["state"])

    return Loop(TRAINER, training(trainer, at), kept, traceable=False)


def our_trainer(at: Setting, method: str, offload_snapshot: bool = False) -> Loop:
    """`SSAMTrainer` over the same."""
    own = {"optim": method, "base_optim": "adamw_torch", "offload_snapshot": offload_snapshot}
    args = SSAMTrainingArguments(**own, **trainer_arguments(at))
    trainer = OurTrainer(args=args, **data(at))

    def kept() -> int:
        return nbytes(trainer.optimizer.state_dict()["state"]) + nbytes(trainer.two_pass.state_dict())

    return Loop(OURS + method, training(trainer, at), kept, baseline=TRAINER, traceable=False)


def trainer_arguments(at: Setting) -> dict[str, Any]:
    """A quiet run that saves nothing; `output_dir` is never written."""
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    size = len(at.batch["labels"])
    where = {"use_cpu": at.device == "cpu", "bf16": at.bf16, "per_device_train_batch_size": size}
    return {"output_dir": tempfile.gettempdir(), "learning_rate": 0.0, "max_steps": 1, **quiet, **where}


def data(at: Setting) -> dict[str, Any]:
    """The batch as rows of a dataset."""
    rows = {k: v.cpu() for k, v in at.batch.items()}
    return {
        "model": at.model,
        "train_dataset": [{k: v[i] for k, v in rows.items()} for i in range(len(rows["labels"]))],
    }


def training(trainer: WatchedTrainer, at: Setting) -> Callable[[int], Taken]:
    """Runs of so many steps after a first one, which is not timed."""
    timer, trainer.watch = Timer(at), at.watch
    trainer.add_callback(timer)
    trainer.remove_callback(PrinterCallback)

    def run(steps: int) -> Taken:
        trainer.args.max_steps = steps + 1
        trainer.train()
        passes = trainer.state.log_history[-1].get("ssam/total_passes", 2.0 * (steps + 1))
        return Taken(timer.seconds, passes * steps / (steps + 1), beside(at, timer.seconds, timer.watched))

    return run


def timed(step: Callable[[], float], at: Setting) -> Callable[[int], Taken]:
    """`step`, so many times by the clock."""
    clock = Clock(at.device)

    def run(steps: int) -> Taken:
        watched = at.watch.seconds
        clock.start()
        passes = sum(step() for _ in range(steps))
        seconds = clock.stop()
        return Taken(seconds, float(passes), beside(at, seconds, at.watch.seconds - watched))

    return run


def beside(at: Setting, seconds: float, watched: float) -> float:
    """See `Taken`."""
    return seconds - watched if at.device == "cpu" else math.nan


def nbytes(state: Any) -> int:
    """Bytes of all tensors in a nested state, but the step counters of an optimizer."""
    if isinstance(state, Tensor):
        return state.nbytes if state.dim() else 0
    return sum(nbytes(v) for v in state.values()) if isinstance(state, dict) else 0
