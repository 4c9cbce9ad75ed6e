"""What every example does around its task: where a run begins and goes on, and what it leaves behind.

A run leaves the model, the Trainer's state, ``all_results.json``, a model card, and one line on the terminal.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .cli import UsageError

COSTS = ("_time", "_runtime", "_per_second", "_num_tokens")


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        needs: the uses of data (``train``, ``eval``, ``predict``) that it cannot do without.
        takes: the uses that it makes of data if there are any.
        checkpoint: where training goes on from; None is the beginning.
    """

    needs: frozenset[str]
    takes: frozenset[str]
    checkpoint: str | None

    @property
    def trains(self) -> bool:
        """Whether the run trains."""
        return "train" in self.needs


def prepare(args: TrainingArguments, offers: Sequence[str] = ("train", "eval")) -> Plan:
    """Settle what the run is to do, before anything is loaded.

    Asked for nothing (by ``--do_train``, ``--do_eval``, ``--do_predict``) it trains, and evaluates if it can; a
    `do_eval` that only follows from `eval_strategy` asks for nothing. ``--resume_from_checkpoint true`` means the last
    checkpoint in the output folder.

    Args:
        args: `do_train` and `do_eval` are set where nothing was asked for.
        offers: the uses that the script has.

    Raises:
        UsageError: the script does not do what was asked for, the checkpoint does not exist, a new run would write
            over another one, or there would be nothing to push.
    """
    asks_to_evaluate = args.do_eval and args.eval_strategy == "no"
    flags = {"train": args.do_train, "eval": asks_to_evaluate, "predict": args.do_predict}
    asked = {use for use, is_asked in flags.items() if is_asked}
    for use in asked - set(offers):
        raise UsageError(f"--do_{use}: this example cannot {use}; do it with the model that it saves")
    evaluates_within = args.eval_strategy != "no" or args.eval_on_start
    needs = (asked or {"train"}) | ({"eval"} if evaluates_within else set())
    if not asked:
        args.do_train = args.do_eval = True
    if args.push_to_hub and not args.do_train:
        raise UsageError("--push_to_hub: a run that does not train has nothing to push; add --do_train, or drop it")
    checkpoint = _checkpoint(args)
    if args.do_train and checkpoint is None:
        _refuse_other_run(Path(args.output_dir))
    return Plan(frozenset(needs), frozenset() if asked else frozenset({"eval"}), checkpoint)


def train_and_report(trainer: Trainer, checkpoint: str | None = None, **card: Any) -> dict[str, float | str]:
    """`train_and_evaluate`, then `conclude`; for the arguments and what it returns see there."""
    return conclude(trainer, train_and_evaluate(trainer, checkpoint), **card)


def train_and_evaluate(trainer: Trainer, checkpoint: str | None = None) -> dict[str, float]:
    """Train and save, then evaluate, as far as the trainer's arguments say so.

    Args:
        trainer: with everything set up.
        checkpoint: where to go on from.

    Returns:
        All metrics, and ``ssam/total_passes``: what the training cost in passes over a batch.
    """
    args, results = trainer.args, {}
    if args.do_train:
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        results["ssam/total_passes"] = _passes(trainer)
    if args.do_eval and trainer.eval_dataset is not None:
        results |= trainer.evaluate()
    return results


def conclude(trainer: Trainer, results: dict[str, float], **card: Any) -> dict[str, float | str]:
    """Write the results; after training also the card, and push both where ``--push_to_hub`` asks for it.

    Args:
        trainer: what ran.
        results: all metrics.
        **card: facts for the model card, as `Trainer.create_model_card` takes them.

    Returns:
        `results`, under the names they have in ``all_results.json``, and the ``output_dir``.
    """
    args = trainer.args
    if trainer.is_world_process_zero():
        _report(trainer, results)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    elif args.do_train:
        trainer.create_model_card(**card)
    return {**results, "output_dir": args.output_dir}


def _report(trainer: Trainer, results: dict[str, float]) -> None:
    """Print the results line, and write ``all_results.json``; a run that only evaluates keeps what training wrote."""
    folder = Path(trainer.args.output_dir)
    path = folder / "all_results.json"
    before = json.loads(path.read_text()) if path.is_file() and not trainer.args.do_train else {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **results}, indent=2, sort_keys=True) + "\n")
    scores = [f"{name} {value:.4f}" for name, value in results.items() if _is_score(name)]
    said = ", ".join(scores) or "no evaluation"
    print(f"results after {trainer.state.global_step} steps: {said}; in {folder}", flush=True)


def _is_score(name: str) -> bool:
    return name.startswith(("eval_", "predict_")) and not name.endswith(COSTS)


def _passes(trainer: Trainer) -> float:
    """A stock optimizer takes one pass a step."""
    log = trainer.state.log_history
    logged = [entry["ssam/total_passes"] for entry in log if "ssam/total_passes" in entry]
    return logged[-1] if logged else float(trainer.state.global_step)


def _checkpoint(args: TrainingArguments) -> str | None:
    if args.resume_from_checkpoint is None or str(args.resume_from_checkpoint).lower() == "false":
        return None
    asked, folder = str(args.resume_from_checkpoint), Path(args.output_dir)
    found = (get_last_checkpoint(folder) if folder.is_dir() else None) if asked.lower() == "true" else asked
    if found is None or not Path(found).is_dir():
        where = folder if found is None else found
        raise UsageError(f"--resume_from_checkpoint {asked}: there is no checkpoint in {where}")
    return str(found)


def _refuse_other_run(folder: Path) -> None:
    unfinished = folder.is_dir() and get_last_checkpoint(folder)
    if unfinished or (folder / "trainer_state.json").is_file():
        way = "go on with it by --resume_from_checkpoint true, or " if unfinished else ""
        raise UsageError(f"--output_dir {folder} holds another run: {way}give another folder, or remove this one")
