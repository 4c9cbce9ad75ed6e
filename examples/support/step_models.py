"""Text classifiers of several sizes, from a config (a step costs the same whatever the weights are), and a batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_ssam.rules.tensors import holders
from support.step_meters import Stopwatch

SIZES = {
    "tiny": (128, 2, 2),
    "minilm": (384, 6, 12),
    "distil": (768, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""Hidden size, layers and heads: 4.4, 22.7, 67, 109 and 335 million parameters."""

LABELS = 6


def classifier(name: str, lora_r: int = 0) -> nn.Module:
    """A size of the table, or a folder or a name on the Hub; with `lora_r` above 0, adapters of that rank train."""
    if name in SIZES:
        hidden, layers, heads = SIZES[name]
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        config = BertConfig(vocab_size=30522, intermediate_size=4 * hidden, num_labels=LABELS, **sizes)
        model = BertForSequenceClassification(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=LABELS)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = 0  # a causal model finds the end of each sample by it; no token here is it
    if lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["query", "value"] if name in SIZES else "all-linear"
    return get_peft_model(model, LoraConfig(r=lora_r, target_modules=targets, task_type="SEQ_CLS"))


@dataclass(frozen=True)
class Setting:
    """What all loops of one measurement share: a model, its batch of random tokens, and where and how they run; and
    the watch that their passes are taken by."""

    model: nn.Module
    batch: dict[str, Tensor]
    device: str
    bf16: bool
    watch: Stopwatch = field(default_factory=Stopwatch)

    def forward_backward(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """One pass over the samples at `indices`; the loss."""
        with self.watch.running():
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss = self.model(**{k: v[indices] for k, v in self.batch.items()}).loss
            loss.backward()
        return loss

    def forward(self, inputs: dict[str, Tensor]) -> None:
        """A look: no gradient, and nothing of it is kept."""
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            self.model(**inputs)

    def unshare(self) -> None:
        """Give each weight that another tensor looks at memory of its own, as in a run that is one loop's alone.

        The SAM of davda54 and its kin leave their copy in the weight's place and keep hold of it, so that the loop
        whose turn is next would have to write beside it.
        """
        for p in self.trained:
            if holders(p) > 1:
                p.data = p.data.clone()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def setting(name: str, shape: tuple[int, int], device: str, bf16: bool, lora_r: int = 0) -> Setting:
    """A model ready to train, and a batch of `shape` (samples, tokens)."""
    model = classifier(name, lora_r).to(device).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    labels = torch.randint(0, LABELS, shape[:1], generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Setting(model, {k: v.to(device) for k, v in batch.items()}, device, bf16)
