"""TRL: two mixins make `SFTTrainer` and `DPOTrainer` sharpness-aware; nothing else changes. pip install trl."""

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_ssam import SSAMArgumentsMixin, SSAMTrainerMixin


class SSAMSFTConfig(SSAMArgumentsMixin, SFTConfig):
    """`SFTConfig` with `optim="ssam"`, `rho` and their like."""


class SSAMSFTTrainer(SSAMTrainerMixin, SFTTrainer):
    """`SFTTrainer` with two passes in a step; tokens are counted once."""


class SSAMDPOConfig(SSAMArgumentsMixin, DPOConfig):
    """`DPOConfig` with the same."""


class SSAMDPOTrainer(SSAMTrainerMixin, DPOTrainer):
    """`DPOTrainer` with two passes in a step; the reference model is left alone."""


def fine_tune(model, tokenizer, conversations, output_dir="out/sft", **training):
    """Supervised fine-tuning on rows with `messages`, `prompt` and `completion`, or `text`."""
    args = SSAMSFTConfig(output_dir, optim="ssam", **training)
    trainer = SSAMSFTTrainer(model, args=args, train_dataset=conversations, processing_class=tokenizer)
    trainer.train()
    return trainer


def prefer(model, tokenizer, preferences, output_dir="out/dpo", **training):
    """Direct preference optimisation on rows with `prompt`, `chosen` and `rejected`."""
    args = SSAMDPOConfig(output_dir, optim="ssam", **training)
    trainer = SSAMDPOTrainer(model, args=args, train_dataset=preferences, processing_class=tokenizer)
    trainer.train()
    return trainer
