"""Fine-tuning an encoder: is the loss of points that SAM shows at ρ 0.05 the method's, or the radius's?

    python examples/run_study.py run configs/studies/text.yaml          # an hour on one core
    python examples/run_study.py run configs/studies/raters.yaml

MiniLM on TREC questions over radii, by `run_text_classification.py` as a user would run it; and on film reviews with
the label of one rater, which is real label noise, against the mean of all raters. The test labels are always the mean.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import pandas as pd
from datasets import DatasetDict

import run_text_classification
from hf_ssam.plots.canvas import canvas, dress, save
from support import offline
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, by_condition, compared, dots

OWN = ("arm", "data", "train_label")
SETS = {"trec": offline.trec, "movie_reviews": offline.movie_reviews}


def measure(settings: Settings) -> Row:
    """Train by the script and read what it reports."""
    with tempfile.TemporaryDirectory() as folder:
        files = written(SETS[settings["data"]](), settings.get("train_label", "label"), Path(folder))
        flags = {**{k: v for k, v in settings.items() if k not in OWN}, **files, "output_dir": f"{folder}/run"}
        with contextlib.redirect_stdout(io.StringIO()):
            found = run_text_classification.main([word for k, v in flags.items() for word in (f"--{k}", str(v))])
    kept = {"eval_accuracy": "test_accuracy", "eval_loss": "test_loss", "ssam/total_passes": "passes"}
    return {name: found[key] for key, name in kept.items()}


def written(data: DatasetDict, column: str, folder: Path) -> dict[str, Path]:
    """The training rows with the labels of `column`, and the test rows with their own, as files for the script."""
    files = {"train_file": ("train", column), "validation_file": ("test", "label")}
    for name, (split, labels) in files.items():
        rows = data[split]
        said = [rows.features[labels].int2str(number) for number in rows[labels]]
        pd.DataFrame({"text": rows["text"], "label": said}).to_csv(folder / f"{name}.csv", index=False)
    return {name: folder / f"{name}.csv" for name in files}


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Test accuracy of each arm, for each kind of training label where there are several."""
    columns = (Column("test loss", "test_loss", ".3f"), Column("passes", "passes", ".0f"))
    if "train_label" not in rows:
        return compared(rows, plan.baseline, "test_accuracy", columns)
    parts = []
    for label, here in by_condition(rows, "train_label"):
        said = {"label": "the mean of all raters", "rater_label": "one rater"}[label]
        parts += [f"**Trained on {said}**\n", compared(here, plan.baseline, "test_accuracy", columns)]
    return "\n".join(parts)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """A dot with its 95 % interval for each arm; `text.png` or `raters.png`."""
    ax = canvas(size=(7.5, 4.0))[0]
    arms = [arm for arm in plan.arms if (rows["arm"] == arm).any()]
    groups = list(by_condition(rows, "train_label")) if "train_label" in rows else [("", rows)]
    for number, (label, here) in enumerate(groups):
        name = {"label": "mean of all raters", "rater_label": "one rater"}.get(label)
        dots(ax, here, arms, number, name)
    dress(ax, plan.title, "", "correct on test rows, %\n(mean, 95 % interval)")
    save(ax, folder / ("raters.png" if len(groups) > 1 else "text.png"))
