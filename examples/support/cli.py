"""The command line that every example shares: a YAML file first, flags over it, mistakes as one sentence.

    python examples/run_x.py configs/tasks/x.yaml --rho 0.1

A value in the file is read exactly as the flag of the same name would be: ``1e-3``, which YAML takes for a word, is a
number.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_ssam.saved.errors import UsageError

USUAL = (
    "output_dir seed num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay bf16 "
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps do_train do_eval do_predict "
    "eval_strategy logging_steps save_strategy resume_from_checkpoint load_best_model_at_end report_to push_to_hub "
    "hub_model_id"
)
"""Of the stock training arguments, what `--help` shows."""

EPILOG = "Every other field of the training arguments is a flag too: --help_all lists them."
TITLES = ("this script", "sharpness-aware training", "training")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, defaults behind the flags, and each flag once, as the files spell it."""

    def __init__(self, prog: str) -> None:
        width = shutil.get_terminal_size(fallback=(120, 24)).columns - 2
        super().__init__(prog, max_help_position=34, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        return action.option_strings[0] + (choices if len(choices) < 40 else "")


class Words(yaml.SafeLoader):
    """YAML whose only truth values are ``true`` and ``false``: ``no`` is a word, as in ``eval_strategy: no``."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class ExampleParser(HfArgumentParser):
    """`HfArgumentParser` with a YAML file as the first argument (or ``--config``) whose values flags override.

    Args:
        dataclass_types: the dataclasses to fill, in the order in which `parse` returns them.
        description: what ``--help`` says first.
    """

    def __init__(self, dataclass_types: Sequence[type], description: str) -> None:
        super().__init__(
            dataclass_types,
            description=description,
            usage="%(prog)s [CONFIG.yaml] [--flag value ...]",
            epilog=EPILOG,
            formatter_class=_Formatter,
        )
        self.add_argument("--config", metavar="CONFIG.yaml", help="A file of flags and values; flags override it.")
        self.add_argument(
            "--help_all", action=_HelpAll, nargs=0, help="Show every field of the training arguments too."
        )

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Fill the dataclasses from `argv` (the command line's by default).

        Raises:
            UsageError: a flag, a key of the file or a value is not valid.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and not argv[0].startswith("-") and argv[0].endswith((".yaml", ".yml")):
            argv.insert(0, "--config")
        config, flags = _config_parser().parse_known_args(argv)
        if config.config:
            self._read(Path(config.config))
        try:
            *parsed, _, unknown = self.parse_args_into_dataclasses(
                flags, return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        if unknown:
            raise UsageError(f"unknown flag {unknown[0]}{self._nearest(unknown[0].lstrip('-'), '--')}")
        return tuple(parsed)

    def format_help(self) -> str:
        """What the script and sharpness-aware training have, and the usual ones of the rest."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        flags = {action.dest: action for action in reversed(self._actions)}  # the first of a name is not its `no_`
        for title, names in zip(TITLES, _sections(list(flags)[::-1]), strict=True):
            formatter.start_section(title)
            formatter.add_arguments([flags[name] for name in names])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def format_all(self) -> str:
        """Every flag."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Argparse's way to refuse a flag, without the page of usage."""
        raise UsageError(f"{message} (--help lists every flag)")

    def _read(self, path: Path) -> None:
        """Make the values in the file at `path` the defaults of the flags."""
        for name, value in yaml_file(path).items():
            actions = [action for action in self._actions if action.dest == name]
            if not actions:
                raise UsageError(f"{path} sets {name!r}, which is not a flag{self._nearest(name)}")
            for action in actions:
                action.required = False
                action.default = _as_typed(action, value)

    def _nearest(self, name: str, prefix: str = "") -> str:
        near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
        return f": did you mean {prefix}{near[0]}?" if near else " (--help lists every flag)"


def _sections(names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Of the flags, those of the script, ours, and the usual ones of the stock training arguments."""
    from hf_ssam import SSAMArgumentsMixin

    ours = {f.name for f in fields(SSAMArgumentsMixin)}
    stock = {f.name for f in fields(TrainingArguments)} - ours
    own = [name for name in names if name not in ours | stock]
    return own, [name for name in names if name in ours], [name for name in USUAL.split() if name in names]


class _HelpAll(argparse.Action):
    """Prints every flag."""

    def __call__(self, parser: ExampleParser, *_: Any) -> NoReturn:  # type: ignore[override]
        print(parser.format_all())
        parser.exit()


def run(main: Callable[[], Any]) -> NoReturn:
    """Run `main` and exit; what the user can mend is one sentence on standard error and exit status 2."""
    from .fetching import OfflineDataError

    try:
        main()
    except (UsageError, OfflineDataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def yaml_file(path: Path) -> dict[str, Any]:
    """The keys and values in the file at `path`.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UsageError(f"there is no configuration file {path}")
    try:
        values = yaml.load(path.read_text(), Words) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold lines of the form `flag: value`")
    return values


def _as_typed(action: argparse.Action, value: Any) -> Any:
    """`value` as argparse would have it: it converts a default that is a string, as it does a flag."""
    if action.nargs in ("+", "*") and value is not None and not isinstance(value, list):
        return [value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and action.type is not None else value
