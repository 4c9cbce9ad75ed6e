"""What a run is trained on, to be left beside its model; the offline sets are known by name."""

from typing import Any

from hf_ssam.saved.data import SETS, RunData

from . import offline, offline_tasks
from .sources import DataArguments

OFFLINE = {
    "trec": offline.trec,
    "trec_fine": lambda: offline.trec(fine=True),
    "movie_reviews": offline.movie_reviews,
    "mnist_5k": offline.mnist_5k,
    "fashion_mnist": offline.fashion_mnist,
    "names": offline_tasks.names,
    "answer_types": offline_tasks.answer_types,
    "questions": offline_tasks.questions,
    "classified_questions": offline_tasks.classified_questions,
}
SETS.update(OFFLINE)


def run_data(args: DataArguments, offline: str, **known: Any) -> RunData:
    """What a run with the flags `args` trains on; `offline` is the set that it takes where none is named."""
    return RunData(**(args.origin or {"offline": offline}), max_samples=args.max_train_samples, **known)
