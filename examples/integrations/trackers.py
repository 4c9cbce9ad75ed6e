"""TensorBoard, Weights & Biases or trackio: `report_to` gets every `ssam/` key, as it gets the loss.

TensorBoard is tested here. The others are meant to work without a network too: Weights & Biases by WANDB_MODE=offline.
"""

import os

from hf_ssam import SSAMTrainer, SSAMTrainingArguments


def train(model, rows, output_dir="out/tracked", report_to="tensorboard", **training):
    """Train, and log each step to `report_to` (`tensorboard`, `wandb`, `trackio`, or a list of them)."""
    os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{output_dir}/runs")
    args = SSAMTrainingArguments(output_dir, optim="ssam", report_to=report_to, **{"logging_steps": 1, **training})
    trainer = SSAMTrainer(model, args, train_dataset=rows)
    trainer.train()
    return trainer
