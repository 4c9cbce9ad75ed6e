"""Optuna searches the learning rate and rho together, through `Trainer.hyperparameter_search`.

python examples/integrations/optuna_search.py --trials 10       # pip install optuna
"""

import argparse
from functools import partial

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_ssam import SSAMTrainer, SSAMTrainingArguments


def space(trial):
    """What a trial may set: any field of the training arguments."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
        "rho": trial.suggest_float("rho", 0.01, 0.2, log=True),
    }


def search(make_model, train, test, tokenizer, output_dir="out/search", trials=10, **training):
    """The best trial: `hyperparameters` and `objective`, the loss on `test`."""
    args = SSAMTrainingArguments(output_dir, optim="ssam", eval_strategy="epoch", **training)
    trainer = SSAMTrainer(
        args=args, train_dataset=train, eval_dataset=test, processing_class=tokenizer, model_init=make_model
    )
    return trainer.hyperparameter_search(
        space,
        n_trials=trials,
        backend="optuna",
        direction="minimize",
        compute_objective=lambda metrics: metrics["eval_loss"],
    )


if __name__ == "__main__":
    from support import offline  # a model and data that need no hub

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    path = str(offline.minilm())
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = offline.trec().map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=32), batched=True)
    train, rest = data["train"].select(range(800)), data["train"].select(range(800, 1200))
    make_model = partial(AutoModelForSequenceClassification.from_pretrained, path, num_labels=6)
    best = search(
        lambda trial: make_model(),
        train,
        rest,
        tokenizer,
        trials=parser.parse_args().trials,
        num_train_epochs=1,
        save_strategy="no",
    )
    print(best.hyperparameters, best.objective)
