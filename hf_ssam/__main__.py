"""`python -m hf_ssam` prints the method table as Markdown, the one that the README shows."""

from __future__ import annotations

from .methods.table import METHODS, Method


def row(method: Method) -> str:
    """One line of the table."""
    options = ", ".join(f"`{name}={option.default}`" for name, option in method.options.items())
    paper = f"[{method.paper.title}]({method.paper.url}), {method.paper.year}"
    summary = method.summary.replace("|", "\\|")
    if method.experimental:
        summary += f" *Experimental: {method.experimental}.*"
    return f"| `{method.name}` | {summary} | {method.rho:g} | {method.passes} | {options} | {paper} |"


def table() -> str:
    """Every method: name, what it computes, default ρ, passes a step, options with their defaults, paper."""
    head = "| `--optim` | what it computes | `rho` | passes | `--optim_args` | paper |\n|---|---|---|---|---|---|"
    return "\n".join([head, *map(row, METHODS.values())])


if __name__ == "__main__":
    print(table())
