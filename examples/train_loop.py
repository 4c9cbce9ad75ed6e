"""Stable SAM in a loop of your own, with Accelerate: no Trainer.

    python examples/train_loop.py --rho 0.05
    python examples/train_loop.py --rho 0           # the plain optimizer: one pass a step
    accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml examples/train_loop.py

MiniLM-L6 learns which of 6 kinds of answer a question wants. What differs from a plain loop is marked: 1, 2, 3.

With `--accumulate n` a step is n micro-batches. The engine gets all of them at once, as a list of functions, because
the second pass has to see them again; `accelerator.accumulate`, which hides steps inside a loop over single batches,
has no place here, nor has `Accelerator(gradient_accumulation_steps=n)`, which divides every loss by n once more.
"""

import argparse
from functools import partial
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers import get_linear_schedule_with_warmup as linear_schedule

from hf_ssam import METHODS, TwoPass
from support import offline


def main(flags: argparse.Namespace) -> None:
    """Train, evaluate, save, and print one results line."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # untold, it runs alone in each CPU process
    set_seed(flags.seed)
    path = flags.model_name_or_path or str(offline.minilm())
    tokenizer = AutoTokenizer.from_pretrained(path)
    with accelerator.main_process_first():
        data = offline.trec().map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)
    data = data.remove_columns("text").rename_column("label", "labels")
    names = dict(enumerate(data["train"].features["labels"].names))
    model = AutoModelForSequenceClassification.from_pretrained(path, id2label=names, dtype=torch.float32)
    collate = DataCollatorWithPadding(tokenizer)
    chosen = data["train"].select(range(min(flags.examples, len(data["train"]))))
    train = DataLoader(chosen, flags.batch, shuffle=True, collate_fn=collate, drop_last=True)
    test = DataLoader(data["test"], 64, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0.01)
    schedule = linear_schedule(optimizer, flags.steps // 10, flags.steps)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    two_pass = TwoPass(model, method=flags.method, rho=flags.rho)  # 1: the engine, over the prepared model

    def forward_backward(batch: dict[str, torch.Tensor]) -> torch.Tensor:  # 2: forward and backward as one function
        loss = model(**batch).loss / flags.accumulate  # its share of the batch
        accelerator.backward(loss)
        return loss

    model.train()
    batches = chain.from_iterable(repeat(train))
    for _ in tqdm(range(flags.steps), disable=not accelerator.is_local_main_process):
        window = [partial(forward_backward, batch) for batch in islice(batches, flags.accumulate)]
        report = two_pass.step(window)  # 3: one call an optimizer step; it leaves `.grad`, and restores the weights
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    accuracy = evaluate(accelerator, model, test)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(flags.output_dir)
        tokenizer.save_pretrained(flags.output_dir)
    accelerator.print(
        f"results after {flags.steps} steps: accuracy {accuracy:.4f}, loss {report.loss:.4f}, scale "
        f"{float(report.scale):.3f}; {accelerator.num_processes} processes; in {flags.output_dir}"
    )
    accelerator.end_training()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, test: DataLoader) -> float:
    """The share of test examples that the model gets right."""
    model.eval()
    pairs = ((model(**batch).logits.argmax(-1), batch["labels"]) for batch in test)
    said, true = zip(*map(accelerator.gather_for_metrics, pairs), strict=True)
    return (torch.cat(said) == torch.cat(true)).float().mean().item()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ssam", choices=list(METHODS), help="how the gradient is computed")
    parser.add_argument("--rho", type=float, help="radius; 0 is the plain optimizer, none the method's own")
    parser.add_argument("--model_name_or_path", help="a model on the Hub or a folder; MiniLM-L6 if not given")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32, help="examples in a micro-batch of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--examples", type=int, default=2000, help="train on so many")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output_dir", default="out/train_loop")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
