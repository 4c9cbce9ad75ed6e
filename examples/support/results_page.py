"""The guide to what was measured: its tables stand between marks and are made from the rows beside it."""

import importlib
import re
from pathlib import Path

import pandas as pd

from .study import RowFile, read_plan
from .summary_figure import write_summary

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "studies"
PAGE = ROOT / "examples" / "guides" / "results.md"
ROWS = PAGE.parent / "results"
FIGURES = ROOT / "examples" / "figures"


def write_page() -> str:
    """Make the tables of the guide and all figures anew; returns the page."""
    for name in committed():
        plan = read_plan(CONFIGS / f"{name}.yaml")
        importlib.import_module(f"studies.{plan.study}").figures(reported(name), plan, FIGURES)
    write_summary(reported, FIGURES / "when_it_pays.png")
    text = filled(PAGE.read_text(), {name: table(name) for name in committed()})
    PAGE.write_text(text)
    return text


def committed() -> list[str]:
    """The studies whose rows are beside the guide."""
    return sorted(path.stem for path in ROWS.glob("*.csv"))


def table(name: str) -> str:
    """The tables of a study, from the rows beside the guide."""
    plan = read_plan(CONFIGS / f"{name}.yaml")
    return importlib.import_module(f"studies.{plan.study}").tables(reported(name), plan)


def reported(name: str) -> pd.DataFrame:
    """The runs of a study that are beside the guide."""
    return read_plan(CONFIGS / f"{name}.yaml").reported(RowFile(ROWS / f"{name}.csv").read())


def filled(page: str, tables: dict[str, str]) -> str:
    """`page` with what stands between `<!-- rows of NAME -->` and `<!-- end -->` replaced by the tables of NAME."""

    def fill(match: re.Match[str]) -> str:
        text = tables.get(match[1])
        return match[0] if text is None else f"<!-- rows of {match[1]} -->\n\n{text.strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- rows of (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)
