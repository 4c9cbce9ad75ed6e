"""A whole run with Stable SAM: load, train, evaluate, and save, or push where a repository is named.

python examples/quickstart.py [--model bert-base-uncased --dataset ag_news]   # neither: MiniLM-L6 and TREC, no hub
"""

from argparse import ArgumentParser

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_ssam import SSAMTrainer, SSAMTrainingArguments
from support import offline  # for the defaults of --model and --dataset only: leave them out of a copy


def main(argv=None):
    parser = ArgumentParser()
    for flag in ("--model", "--dataset", "--output_dir", "--max_steps", "--push_to"):
        parser.add_argument(flag)
    flags = parser.parse_args(argv)
    data, model = load_dataset(flags.dataset) if flags.dataset else offline.trec(), flags.model or offline.minilm()
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
    names = dict(enumerate(data["train"].features["label"].names))
    model = AutoModelForSequenceClassification.from_pretrained(model, id2label=names, ignore_mismatched_sizes=True)
    args = SSAMTrainingArguments(
        flags.output_dir or "out/quickstart", optim="ssam", rho=0.01, learning_rate=2e-4, num_train_epochs=1,
        max_steps=int(flags.max_steps or -1), per_device_train_batch_size=32, hub_model_id=flags.push_to,
    )  # fmt: skip
    trainer = SSAMTrainer(
        model, args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=lambda pair: {"accuracy": (pair.predictions.argmax(-1) == pair.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    print(trainer.evaluate())
    trainer.save_state()  # for `hf-ssam plot`
    trainer.push_to_hub() if flags.push_to else trainer.save_model()


if __name__ == "__main__":
    main()
