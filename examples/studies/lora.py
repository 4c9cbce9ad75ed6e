"""LoRA by the methods made for it: a smoke test, which shows that they train, and no more than that.

    python examples/run_study.py run configs/studies/lora.yaml          # half an hour on one core
    python examples/run_study.py run configs/studies/lora.yaml --fast

Adapters on MiniLM learn the kind of answer that TREC questions ask for. Nothing is tuned: each method has its default
radius and all have one learning rate.
"""

import tempfile
from pathlib import Path

import pandas as pd
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from hf_ssam.plots.canvas import canvas, dress, save
from support import offline
from support.runs import passes
from support.study import Row, Settings, StudyPlan
from support.study_tables import Column, compared, dots

OWN = ("arm", "rows", "length", "r")


def measure(settings: Settings) -> Row:
    """Train an adapter and its head, and score it on the test questions."""
    set_seed(settings["seed"])
    data, tokenizer = offline.trec(), AutoTokenizer.from_pretrained(offline.minilm())
    drawn = data["train"].shuffle(seed=settings["seed"]).select(range(settings["rows"]))
    train, test = (encoded(some, tokenizer, settings["length"]) for some in (drawn, data["test"]))
    model = adapted(data["train"].features["label"].num_classes, settings["r"])
    with tempfile.TemporaryDirectory() as folder:
        args = SSAMTrainingArguments(folder, **{k: v for k, v in settings.items() if k not in OWN})
        collate = DataCollatorWithPadding(tokenizer)
        trainer = SSAMTrainer(model, args, collate, train, test, tokenizer, compute_metrics=accuracy)
        trainer.train()
        found = trainer.evaluate()
    return {"test_accuracy": found["eval_accuracy"], "test_loss": found["eval_loss"], "passes": passes(trainer)}


def encoded(rows: Dataset, tokenizer: AutoTokenizer, length: int) -> Dataset:
    """The questions as token numbers, with their labels."""
    columns = [name for name in rows.column_names if name != "label"]
    return rows.map(lambda some: tokenizer(some["text"], truncation=True, max_length=length), remove_columns=columns)


def adapted(classes: int, r: int) -> PeftModel:
    """MiniLM with adapters of rank `r` on every linear layer, and a head that trains whole."""
    model = AutoModelForSequenceClassification.from_pretrained(offline.minilm(), num_labels=classes)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="SEQ_CLS"))


def accuracy(predicted: tuple) -> dict[str, float]:
    """The share of right answers."""
    logits, labels = predicted
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def tables(rows: pd.DataFrame, plan: StudyPlan) -> str:
    """Test accuracy of each method against plain LoRA."""
    columns = (Column("test loss", "test_loss", ".3f"), Column("passes", "passes", ".0f"))
    return compared(rows, plan.baseline, "test_accuracy", columns)


def figures(rows: pd.DataFrame, plan: StudyPlan, folder: Path) -> None:
    """`lora.png`: a dot with its 95 % interval for each method."""
    ax = canvas(size=(7.0, 3.6))[0]
    dots(ax, rows, [arm for arm in plan.arms if (rows["arm"] == arm).any()])
    dress(ax, plan.title, "", "correct on test questions, %\n(mean, 95 % interval)")
    save(ax, folder / "lora.png")
