"""How sharp are these models? Measures saved models side by side, on the same rows.

    python examples/measure_sharpness.py runs/ssam runs/adamw                      # folders or names on the Hub
    python examples/measure_sharpness.py runs/ssam --parameters "layer\\.0\\." classifier
    python examples/measure_sharpness.py gpt2 --dataset_name my/texts --text_column text

Prints a table (top eigenvalues, trace with its standard error, rise of the loss at rho) and writes it with the figures
to `--output_dir`. Text classifiers, causal language models and image classifiers are told apart by their
configuration; a model without a head gets a fresh one, which is said. With no data set it takes the offline TREC
questions, or the offline digits for images.
"""

import argparse
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, load_dataset, load_from_disk
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)

import offline
from cli import UsageError, run
from hf_ssam.plots import plot_loss_line, plot_loss_plane, plot_spectrum
from hf_ssam.sharpness import (
    ascent_sharpness,
    loss_line,
    loss_plane,
    random_direction,
    spectrum,
    top_eigenvalues,
    trace,
)

Batches = list[dict[str, torch.Tensor]]


@dataclass
class Subject:
    """A model with the rows it is measured on."""

    name: str
    model: PreTrainedModel
    batches: Batches


def load(name: str, args: argparse.Namespace) -> Subject:
    """The model `name` and `args.rows` rows in its own tokens or pixels."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name} is neither a model folder nor a name on the Hub: {str(error).splitlines()[0]}"
        ) from error
    head = (config.architectures or [""])[0]
    set_seed(0)
    if "ForCausalLM" in head or "LMHeadModel" in head:
        model = AutoModelForCausalLM.from_pretrained(name)
        return Subject(name, model, texts(name, rows(args, offline.trec), args))
    if "ForImageClassification" in head:
        model = AutoModelForImageClassification.from_pretrained(name)
        return Subject(name, model, images(name, model, rows(args, offline.mnist_5k), args))
    data = rows(args, offline.trec)
    if "ForSequenceClassification" in head:
        model = AutoModelForSequenceClassification.from_pretrained(name)
    else:
        print(f"{name} has no classification head: measured with a fresh one.")
        labels = len(set(data[args.label_column]))
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)
    return Subject(name, model, classified(name, model, data, args))


def rows(args: argparse.Namespace, default: Any) -> Dataset:
    """The rows to measure on: the first of the split, shuffled with seed 0."""
    if args.dataset_name is None:
        data = default()
    elif Path(args.dataset_name).is_dir():
        data = load_from_disk(args.dataset_name)
    else:
        data = load_dataset(args.dataset_name)
    data = data if isinstance(data, Dataset) else data[args.split]
    return data.shuffle(seed=0).select(range(min(args.rows, len(data))))


def batched(data: Dataset, size: int) -> list[dict[str, list]]:
    """The rows in order, `size` at a time."""
    return [data[i : i + size] for i in range(0, len(data), size)]


def classified(name: str, model: PreTrainedModel, data: Dataset, args: argparse.Namespace) -> Batches:
    """Tokenised texts with their labels."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = label_ids(model, data, args)
    return [
        {**tokenized(tokenizer, part[column(data, args.text_column)], args), "labels": ids(part[args.label_column])}
        for part in batched(data, args.batch_size)
    ]


def texts(name: str, data: Dataset, args: argparse.Namespace) -> Batches:
    """Tokenised texts that are their own labels, padding left out."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    parts = [
        tokenized(tokenizer, part[column(data, args.text_column)], args) for part in batched(data, args.batch_size)
    ]
    return [{**p, "labels": p["input_ids"].where(p["attention_mask"].bool(), -100)} for p in parts]


def images(name: str, model: PreTrainedModel, data: Dataset, args: argparse.Namespace) -> Batches:
    """Pixels with their labels."""
    processor = AutoImageProcessor.from_pretrained(name)
    ids = label_ids(model, data, args)
    return [
        {
            "pixel_values": processor([i.convert("RGB") for i in part["image"]], return_tensors="pt")["pixel_values"],
            "labels": ids(part[args.label_column]),
        }
        for part in batched(data, args.batch_size)
    ]


def tokenized(tokenizer: Any, part: list[str], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A padded batch."""
    return dict(tokenizer(part, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt"))


def column(data: Dataset, name: str) -> str:
    """`name`, if there is such a column."""
    if name not in data.column_names:
        raise UsageError(
            f"the data set has no column {name!r}; --text_column and --label_column take {data.column_names}"
        )
    return name


def label_ids(model: PreTrainedModel, data: Dataset, args: argparse.Namespace) -> Any:
    """What turns labels into the model's: by name where the model knows the names, as numbers otherwise."""
    feature = data.features[column(data, args.label_column)]
    known = model.config.label2id or {}
    if isinstance(feature, ClassLabel) and set(feature.names) <= set(known):
        return lambda labels: torch.tensor([known[feature.int2str(label)] for label in labels])
    largest = max(data[args.label_column])
    if not isinstance(largest, int) or largest >= model.config.num_labels:
        raise UsageError(f"label {largest!r} of the data is none of the model's {model.config.num_labels} labels")
    return torch.tensor


def measure(subject: Subject, pattern: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    how = {"parameters": pattern, "progress": args.progress}
    model, batches = subject.model, subject.batches
    top = top_eigenvalues(model, batches, k=args.k, tol=args.tol, **how)
    total = trace(model, batches, args.trace_samples, **how)
    rise = ascent_sharpness(model, batches, args.rho, **how)
    adaptive = ascent_sharpness(model, batches, args.adaptive_rho, adaptive=True, **how)
    return {
        "model": subject.name,
        "weights": pattern or "all trainable",
        "n": top.parameters,
        "loss": rise.loss,
        "eigenvalues": top.values,
        "trace": total.value,
        "trace_error": total.standard_error,
        "rise": rise.value,
        "adaptive_rise": adaptive.value,
        "precision": top.precision,
        "solver": top.solver,
        "converged": top.converged,
        "products": top.products + total.products,
        "eigenvalue_seconds": top.seconds,
        "seconds": top.seconds + total.seconds,
    }


def table(measured: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows in Markdown."""
    heads = ("model", "weights", "n", "loss", "λ₁", "λ₂ …", "trace ± error", f"rise at ρ = {args.rho:g}")
    heads += (f"adaptive, ρ = {args.adaptive_rho:g}", "products", "s")
    lines = [heads, ("---",) * len(heads)]
    for m in measured:
        first, *others = (f"{v:.4g}" for v in m["eigenvalues"])
        name = Path(m["model"]).name if Path(m["model"]).is_dir() else m["model"]
        trace_text = f"{m['trace']:.4g} ± {m['trace_error']:.2g}"
        numbers = (f"{m['n']:,}", f"{m['loss']:.4f}", first, " ".join(others) or "–", trace_text)
        lines.append((name, m["weights"], *numbers, f"{m['rise']:.4f}", f"{m['adaptive_rise']:.4f}"))
        lines[-1] += (str(m["products"]), f"{m['seconds']:.1f}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(subjects: list[Subject], args: argparse.Namespace) -> None:
    """Spectra over each other, the loss along the top eigenvector and a random direction, and a plane a model."""
    spectra, lines = {}, {}
    for i, subject in enumerate(subjects):
        how = {"progress": args.progress}
        model, batches = subject.model, subject.batches
        name = Path(subject.name).name
        spectra[name] = spectrum(model, batches, args.spectrum_steps, 1, **how)
        top = top_eigenvalues(model, batches, tol=1e-2, vectors=True, **how)
        random = random_direction(model)
        length = sum(t.square().sum() for t in random.values()).sqrt()
        reach = args.reach * torch.linspace(-1, 1, 21)
        lines[f"{name}: top eigenvector"] = loss_line(model, batches, top.vectors[0], reach.tolist(), **how)
        unit = {n: t / length for n, t in random.items()}
        lines[f"{name}: random direction"] = loss_line(model, batches, unit, reach.tolist(), **how)
        if args.plane:
            other = random_direction(model, seed=1)
            plane = loss_plane(model, batches, random, other, torch.linspace(-1, 1, 11).tolist(), **how)
            names = ("first random direction, filter-normalised", "second")
            plot_loss_plane(plane, args.output_dir / f"plane_{i}_{name}.png", names=names)
    plot_spectrum(spectra, args.output_dir / "spectrum.png")
    plot_loss_line(lines, args.output_dir / "loss_line.png")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for; returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a name on the Hub")
    parser.add_argument("--dataset_name", help="on the Hub, or a folder of `save_to_disk`")
    parser.add_argument("--split", default="train")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--rows", type=int, default=32, help="rows of the probe")
    parser.add_argument("--batch_size", type=int, default=8, help="smaller ones need less memory, same numbers")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument(
        "--parameters", nargs="*", default=[None], help="patterns of weight names, a row of the table each"
    )
    parser.add_argument("--k", type=int, default=1, help="how many eigenvalues")
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--trace_samples", type=int, default=10)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--adaptive_rho", type=float, default=0.5)
    parser.add_argument("--spectrum_steps", type=int, default=20)
    parser.add_argument("--reach", type=float, default=0.5, help="how far the lines go, in ‖w' − w‖")
    parser.add_argument("--plane", action="store_true", help="also draw a plane of two random directions a model")
    parser.add_argument("--no_figures", action="store_true")
    parser.add_argument("--progress", action="store_true", help="show bars")
    parser.add_argument("--output_dir", type=Path, default=Path("sharpness"))
    args = parser.parse_args(argv)
    subjects = [load(name, args) for name in args.models]
    before = memory()
    measured = [measure(s, pattern, args) for s in subjects for pattern in args.parameters]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "sharpness.json").write_text(json.dumps(measured, indent=1))
    (args.output_dir / "sharpness.md").write_text(table(measured, args) + "\n")
    print(table(measured, args))
    print(f"memory: {memory() - before:.0f} MiB above the {before:.0f} MiB of a process with the models loaded.")
    if not args.no_figures:
        draw(subjects, args)
    print(f"written to {args.output_dir}")
    return measured


def memory() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run(main)
