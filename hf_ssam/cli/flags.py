"""What the commands share of their flags."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..saved.errors import UsageError


class Parser(argparse.ArgumentParser):
    """`argparse`, with the docstring as it is written, and mistakes as one sentence."""

    def __init__(self, command: str, doc: str | None, **kwargs: Any):
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(f"hf-ssam {command}", description=doc, formatter_class=how, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Refuse a flag without the page of usage."""
        raise UsageError(f"{message} ({self.prog} --help lists every flag)")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What saved models are measured on."""
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--data", help="a file (.csv, .json …), or a folder of images by class, to measure on instead")
    other.add_argument("--dataset_name", help="the same, on the Hub, or a folder of `save_to_disk`")
    parser.add_argument("--split", help="of a data set that has several; train if not given")
    parser.add_argument("--text_column", nargs="+", help="the run's, or text; two for pairs")
    parser.add_argument("--image_column", help="the run's, or image")
    parser.add_argument("--label_column", help="the run's, or label")
    parser.add_argument("--max_length", type=int, default=128)


def markdown(lines: list[dict[str, str]]) -> str:
    """A table of lines that all have the same headings."""
    rows = [tuple(lines[0]), ("---",) * len(lines[0]), *(tuple(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
