"""What every example does around its task: where a run begins and goes on, and what it leaves behind.

A run leaves the model, the Trainer's state, ``all_results.json``, a model card, and one line on the terminal.
"""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cli import UsageError

COSTS = ("_time", "_runtime", "_per_second")


def prepare(args: TrainingArguments) -> str | None:
    """Settle what the run is to do, before anything is loaded.

    With none of ``--do_train`` and ``--do_eval`` it trains and evaluates; a `do_eval` that only follows from
    `eval_strategy` asks for nothing.

    Returns:
        The checkpoint to go on from, or None; ``--resume_from_checkpoint true`` means the last in the output folder.

    Raises:
        UsageError: the checkpoint does not exist, or a new run would write over another one.
    """
    asks_to_evaluate = args.do_eval and args.eval_strategy == "no"
    if args.do_predict:
        raise UsageError("--do_predict: this example only trains and evaluates; predict with the model that it saves")
    if not (args.do_train or asks_to_evaluate):
        args.do_train = args.do_eval = True
    checkpoint = _checkpoint(args)
    if args.do_train and checkpoint is None:
        _refuse_other_run(Path(args.output_dir))
    return checkpoint


def train_and_report(trainer: Trainer, checkpoint: str | None = None, **card: Any) -> dict[str, float | str]:
    """Train, save, evaluate, write the results and the card, and push them where ``--push_to_hub`` asks for it.

    Args:
        trainer: with everything set up.
        checkpoint: where to go on from.
        **card: facts for the model card, as `Trainer.create_model_card` takes them.

    Returns:
        All metrics, under the names they have in ``all_results.json``, and the ``output_dir``.
    """
    args, results = trainer.args, {}
    if args.do_train:
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
    if args.do_eval and trainer.eval_dataset is not None:
        results |= trainer.evaluate()
    results |= {f"ssam/{name}": value for name, value in _passes(trainer).items()}
    if trainer.is_world_process_zero():
        report(results, trainer.state.global_step, Path(args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return {**results, "output_dir": args.output_dir}


def report(results: dict[str, float], steps: int, folder: Path) -> None:
    """Write ``all_results.json`` to `folder`, and print the results line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all_results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    scores = [f"{n} {v:.4f}" for n, v in results.items() if n.startswith("eval_") and not n.endswith(COSTS)]
    print(f"results after {steps} steps: {', '.join(scores) or 'no evaluation'}; in {folder}", flush=True)


def _passes(trainer: Trainer) -> dict[str, float]:
    """What the run cost in passes over a batch; a stock optimizer takes one a step."""
    log = trainer.state.log_history
    logged = [entry["ssam/total_passes"] for entry in log if "ssam/total_passes" in entry]
    return {"total_passes": logged[-1] if logged else float(trainer.state.global_step)}


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
