"""The methods in words: the README's table, the table of a terminal, and a page for each."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable

from ..methods import METHODS, Method, Option

HEAD = "| `--optim` | what it computes, when | `rho` | passes | `--optim_args` | paper |\n|---|---|---|---|---|---|"


def table(methods: Iterable[Method] | None = None) -> str:
    """Every method as Markdown: name, what it computes and when to choose it, default ρ, passes a step, options."""
    return "\n".join([HEAD, *map(row, METHODS.values() if methods is None else methods)])


def row(method: Method) -> str:
    """One line of the Markdown table."""
    options = ", ".join(f"`{name}={written(option)}`" for name, option in method.own_options.items())
    paper = f"[{method.paper.short}]({method.paper.url})" if method.paper.arxiv else method.paper.short
    words = [method.summary, f"**{method.when}**" if method.when else "", _mark(method)]
    what = " ".join(filter(None, words)).replace("|", "\\|")
    return f"| `{method.name}` | {what} | {method.rho:g} | {method.passes} | {options} | {paper} |"


def lines(methods: Iterable[Method]) -> str:
    """The table of a terminal: name, ρ, passes, when."""
    shown = [(m.name, f"{m.rho:g}", m.passes.partition(",")[0], m.when or m.summary) for m in methods]
    rows = [("method", "rho", "passes", "when"), *shown]
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in rows)


def page(method: Method) -> str:
    """All there is to know of a method, as Markdown that reads well in a terminal."""
    options = "\n".join(_option(name, option) for name, option in method.options.items())
    paper = method.paper
    parts = [
        f"# {method.name}",
        method.summary,
        f"**When:** {method.when}" if method.when else "",
        _mark(method),
        f"## Equation\n\n{equation(method)}",
        f"## Use\n\n```bash\n--optim {method.name} --rho {method.rho:g}\n```\n\n{cost(method)}",
        f"## Options (`--optim_args name=value,…`)\n\n{options}" if options else "",
        f"## Paper\n\n{paper.authors.replace(' and ', '; ')}: {paper.title}. {paper.venue}, {paper.year}."
        + (f" {paper.url}" if paper.arxiv else ""),
        f"```bibtex\n{paper.bibtex}\n```",
    ]
    return "\n\n".join(filter(None, parts))


def cost(method: Method) -> str:
    """What a perturbed step costs, and which optimizer uses the gradient."""
    base = "its own optimizer, adam_beta1, adam_beta2 and adam_epsilon" if method.optimizer else "any `--base_optim`"
    return (
        f"A perturbed step costs {method.passes} forward-backward pass{'' if method.passes == '1' else 'es'} over the "
        f"batch, where the plain optimizer takes 1. The gradient goes to {base}."
    )


def equation(method: Method) -> str:
    """What the file of its rules says: the citation, the equation, and why."""
    doc = getattr(inspect.getmodule(method.rules), "__doc__", None) or ""
    return doc.partition("\n")[2].strip("\n") or method.summary


def written(option: Option) -> str:
    """A default, as it is written on the command line."""
    return _plain(option.default)


def _option(name: str, option: Option) -> str:
    needed = option.only_if and f" Only with `{option.only_if[0]}={' or '.join(map(_plain, option.only_if[1]))}`."
    text = f"- `{name}={written(option)}` ({option.range}): {option.help}.{needed or ''}"
    return textwrap.fill(text, 110, subsequent_indent="  ", break_long_words=False)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mark(method: Method) -> str:
    return f"*Experimental: {method.experimental}.*" if method.experimental else ""
