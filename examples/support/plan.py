"""What a run is to do and where it goes on, settled before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_ssam.run_folder import TRAINER_STATE

from .cli import UsageError


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
    if unfinished or (folder / TRAINER_STATE).is_file():
        way = "go on with it by --resume_from_checkpoint true, or " if unfinished else ""
        raise UsageError(f"--output_dir {folder} holds another run: {way}give another folder, or remove this one")
