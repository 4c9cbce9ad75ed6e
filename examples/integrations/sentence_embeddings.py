"""Sentence Transformers: the same two mixins over its trainer. pip install sentence-transformers."""

from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hf_ssam import SSAMArgumentsMixin, SSAMTrainerMixin


class Arguments(SSAMArgumentsMixin, SentenceTransformerTrainingArguments):
    """Its arguments and ours."""


class Trainer(SSAMTrainerMixin, SentenceTransformerTrainer):
    """Its trainer, with two passes in a step."""


def train(model, pairs, output_dir="out/embeddings", **training):
    """Train `model` on rows with `anchor` and `positive`."""
    args = Arguments(output_dir, optim="ssam", **training)
    trainer = Trainer(model=model, args=args, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    return trainer
