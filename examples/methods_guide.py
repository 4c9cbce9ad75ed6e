"""Write what pages say of the methods: guides/methods.md, a section for each, and the table of the README.

python examples/methods_guide.py
"""

import inspect
import re
from pathlib import Path

from hf_ssam.cli.pages import table
from hf_ssam.methods import METHODS, Method
from hf_ssam.methods.options import Option

PAGE = Path(__file__).parent / "guides" / "methods.md"
README = Path(__file__).parents[1] / "README.md"
HEAD = """# Methods

`python examples/methods_guide.py` writes this page from the table of methods; edit the files in `hf_ssam/methods/`.
Options go into `--optim_args "name=value,name=value"`, or `optim_args` in Python."""


def page() -> str:
    """The whole page."""
    links = " · ".join(f"[`{name}`](#{name})" for name in METHODS)
    return "\n\n".join([HEAD, links, *map(section, METHODS.values())]) + "\n"


def readme() -> str:
    """The README, with the table as it is now."""
    begin, end = "<!-- methods: begin -->\n", "\n<!-- methods: end -->"
    return re.sub(f"(?s){begin}.*{end}", lambda _: f"{begin}{table()}{end}", README.read_text())


def section(method: Method) -> str:
    """One method."""
    when = vars(method).get("when", "")
    paper = f"{method.paper.title}, {method.paper.venue}, {method.paper.year}"
    parts = [
        f"## {method.name}",
        method.summary,
        f"**When**: {when}" if when else "",
        f"*Experimental: {method.experimental}.*" if method.experimental else "",
        f"```text\n{equation(method)}\n```",
        f"`rho` {method.rho:g} · {method.passes} forward-backward passes a perturbed step · {optimizer(method)}",
        "\n".join(option(name, each) for name, each in method.options.items()),
        f"Paper: [{paper}]({method.paper.url})." if method.paper.arxiv else f"Paper: {paper}.",
    ]
    return "\n\n".join(filter(None, parts))


def equation(method: Method) -> str:
    """The docstring of the file of its rules: citation, equation, and why."""
    return inspect.getdoc(inspect.getmodule(method.rules)) or method.summary


def optimizer(method: Method) -> str:
    """Which optimizer uses the gradient."""
    return "an optimizer of its own" if method.optimizer else "any `base_optim`"


def option(name: str, each: Option) -> str:
    """One line: default, range, what it does, and with which other option."""
    needed = f" Only with `{each.only_if[0]}` {' or '.join(map(str, each.only_if[1]))}." if each.only_if else ""
    return f"- `{name}={each.default}` ({each.range}): {each.help}.{needed}"


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
    print(PAGE, README)
