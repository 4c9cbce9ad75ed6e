"""README and guides: what they link to exists, and what is generated is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import methods_guide

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("*.md"))]


def inline(page: Path) -> list:
    return [child for token in MarkdownIt().parse(page.read_text()) for child in token.children or []]


def links(page: Path) -> set[str]:
    """Where links and pictures of `page` point to, tables included."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    found = {t.attrs.get("href") or t.attrs.get("src") for t in inline(page) if t.type in ("link_open", "image")}
    return found | set(re.findall(r"\]\(([^)\s]+)\)", text))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of `page`."""
    tokens = MarkdownIt().parse(page.read_text())
    heads = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_guide_is_a_page_that_some_other_page_links() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    for guide in (ROOT / "examples" / "guides").glob("*.md"):
        assert guide in linked, guide


def test_methods_guide_is_what_the_table_says() -> None:
    assert methods_guide.PAGE.read_text() == methods_guide.page(), "run python examples/methods_guide.py"


def test_distributed_guide_names_tests_that_exist() -> None:
    text = (ROOT / "examples" / "guides" / "distributed.md").read_text()
    names = set(re.findall(r"def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))))
    named = re.findall(r"`(test_\w+)(…?)`", text)
    assert len(named) > 20
    for name, cut in named:
        assert name in names or (cut and any(each.startswith(name) for each in names)), name
