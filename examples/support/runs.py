"""How every example trains, evaluates and reports, and what it leaves behind.

A run leaves the model, the Trainer's state, ``all_results.json``, a model card, ``_data.json`` (what it was trained
on), and one line on the terminal.
"""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_ssam import SSAMTrainingArguments
from hf_ssam.run_folder import RESULTS
from hf_ssam.saved.data import RunData

from .offline import hub_name

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
    trainer.card_base_model = hub_name(trainer.model.config.name_or_path)
    if args.do_train:
        if trainer.is_world_process_zero():
            data.write(Path(args.output_dir))
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()  # before the evaluation, which may fail, and again with its scores
        results["ssam/total_passes"] = passes(trainer)
    if args.do_eval and trainer.eval_dataset is not None:
        results |= trainer.evaluate()
        if args.do_train:
            trainer.save_state()
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
    if trainer.args.do_train:
        print(closing(trainer.args, results, trainer.state.log_history), flush=True)


def closing(args: SSAMTrainingArguments, results: dict[str, float], log: list[dict[str, Any]]) -> str:
    """What a run that trained came to: the score before and after, what it cost, and what to do next."""
    at_start = next((entry for entry in log if entry.get("step") == 0 and any(map(_is_score, entry))), {})
    names = [name for name in results if _is_score(name) and not name.endswith("_loss")]
    lines = [
        f"  {name.removeprefix('eval_')}: {at_start[name]:.4f} before training, {results[name]:.4f} after"
        for name in names[:1]
        if name in at_start
    ]
    passes, seconds = results["ssam/total_passes"], results["train_runtime"]
    since = f" since step {results['train_resumed_at']}, where it was resumed" if "train_resumed_at" in results else ""
    lines.append(f"  cost: {passes:g} passes over a batch, {seconds:.0f} s of training{since}")
    folder = Path(args.output_dir)
    lines.append(f"  model and card: {folder} (README.md)")
    lines.append(f"  next: hf-ssam plot {folder}")
    if args.is_sharpness_aware:
        base = args.base_optim.value
        lines.append(f"  compare: the same command with --optim {base} --output_dir {folder}-{base}")
    return "\n".join(lines)


def _is_score(name: str) -> bool:
    return name.startswith(("eval_", "predict_")) and not name.endswith(COSTS)


def passes(trainer: Trainer) -> float:
    """What the training cost in passes over a batch; a stock optimizer takes one a step."""
    log = trainer.state.log_history
    logged = [entry["ssam/total_passes"] for entry in log if "ssam/total_passes" in entry]
    return logged[-1] if logged else float(trainer.state.global_step)
