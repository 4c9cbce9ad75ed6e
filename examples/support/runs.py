"""How every example trains, evaluates and reports, and what it leaves behind.

A run leaves the model, the Trainer's state, ``all_results.json``, a model card, ``_data.json`` (what it was trained
on), and one line on the terminal.
"""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_ssam.run_folder import RESULTS

from .run_data import RunData

COSTS = ("_time", "_runtime", "_per_second", "_num_tokens")


def train_and_report(trainer: Trainer, checkpoint: str | None, data: RunData, **card: Any) -> dict[str, float | str]:
    """`train_and_evaluate`, then `conclude`; for the arguments and what it returns see there."""
    return conclude(trainer, train_and_evaluate(trainer, checkpoint, data), **card)


def train_and_evaluate(trainer: Trainer, checkpoint: str | None, data: RunData) -> dict[str, float]:
    """Train and save, then evaluate, as far as the trainer's arguments say so.

    Args:
        trainer: with everything set up.
        checkpoint: where to go on from.
        data: what it trains on, which is left beside the model.

    Returns:
        All metrics, and ``ssam/total_passes``: what the training cost in passes over a batch.
    """
    args, results = trainer.args, {}
    if args.do_train:
        if trainer.is_world_process_zero():
            data.write(Path(args.output_dir))
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        results["ssam/total_passes"] = passes(trainer)
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
    path = folder / RESULTS
    before = json.loads(path.read_text()) if path.is_file() and not trainer.args.do_train else {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **results}, indent=2, sort_keys=True) + "\n")
    scores = [f"{name} {value:.4f}" for name, value in results.items() if _is_score(name)]
    said = ", ".join(scores) or "no evaluation"
    print(f"results after {trainer.state.global_step} steps: {said}; in {folder}", flush=True)


def _is_score(name: str) -> bool:
    return name.startswith(("eval_", "predict_")) and not name.endswith(COSTS)


def passes(trainer: Trainer) -> float:
    """What the training cost in passes over a batch; a stock optimizer takes one a step."""
    log = trainer.state.log_history
    logged = [entry["ssam/total_passes"] for entry in log if "ssam/total_passes" in entry]
    return logged[-1] if logged else float(trainer.state.global_step)
