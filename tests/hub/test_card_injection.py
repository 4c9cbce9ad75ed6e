"""Whatever a field holds, the card keeps its structure, and shows the field as it is.

The oracle is a Markdown parser: the card of a run with nasty names has the tokens of the same run with plain ones.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_ssam import METHODS
from hf_ssam.hub.markdown import cell, code, fenced, text
from tests.hub.test_model_card import arguments, card_of
from tests.support.hub_run import trainer

PARSER = MarkdownIt("commonmark").enable("table")
NASTY = {
    "yaml": "a: [b, {c: 1}] # not a comment",
    "yaml_end": "x\n---\ntags: [owned]\n---\n# Owned",
    "yaml_number": "1_000",
    "yaml_tag": "!!python/object/apply:os.system ['true']",
    "yaml_alias": "*a &a",
    "html": "<script>alert(1)</script><img src=x onerror=y>",
    "html_block": "\n\n<div>\n\n**owned**\n\n</div>",
    "comment": "<!-- x",
    "entity": "&lt;b&gt; &amp;",
    "jinja": "{{ 7*7 }}{% for x in y %}{# z #}",
    "link": "](https://evil.org) [click](javascript:alert(1)) ![i](x)",
    "autolink": "<https://evil.org>",
    "cell": "a | b | c",
    "cell_escape": "a \\| b \\",
    "backticks": "`a` ``b`` ```\n```\n# Owned\n```python",
    "tick_at_the_end": "a`",
    "pipe_and_ticks": "q|v`w",
    "emphasis": "**a** __b__ *c* _d_ ~~e~~ __init__",
    "heading": "# Owned\n\n## More",
    "underline": "a\n===\nb\n---",
    "rule": "---",
    "list": "- a\n- b",
    "number": "1. a",
    "quote": "> a",
    "fence": "~~~\nx",
    "line_ends": "a\r\nb\u2028c\x0bd",
    "backslash": "a\\",
    "quotes": '"\'\\"',
    "blank": " ",
    "direction": "abc\u202egnp.exe",
    "definition": "[x]: https://evil.org",
    "braces": "} \\input{x} %",
}


def spaced(value: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def tokens(markdown: str) -> list[tuple]:
    """The structure of a text: every token but the words."""
    found = []
    for block in PARSER.parse(markdown):
        found.append((block.type, block.tag, block.level, block.info))
        for token in block.children or []:
            if token.type == "html_inline":
                assert token.content in ("<code>", "</code>")
                found += ["code"] if token.content == "<code>" else []
            elif token.type == "code_inline":
                found.append("code")
            elif token.type not in ("text", "text_special"):
                found.append((token.type, token.tag, tuple(token.attrs)))
    return found


def shown(markdown: str) -> str:
    """The words of a text as a reader sees them, code blocks included."""
    words = []
    for block in PARSER.parse(markdown):
        words += [block.content] if block.type == "fence" else []
        words += ["".join(t.content for t in block.children or [] if t.type != "html_inline")]
    return "\n".join(words)


def run_with(folder: Path, value: str):
    """A trained run's stand-in in which every field that a card shows, and a user may choose, is `value`."""
    path = folder / "run"
    run = trainer(arguments(path, base_optim="sgd", base_optim_args=value, perturb=value, hub_revision=value))
    run.hub_model_id = value
    run.state.log_history = [
        {"step": 0, f"eval_{value}": 0.5, "eval_loss": 2.0},
        {"step": 2, "loss": 1.0, "epoch": 1.0},
        {"step": 2, f"eval_{value}": 0.75, "eval_loss": 1.0, "epoch": 1.0},
        {"step": 2, f"sharpness/{value}": 3.0, "train_runtime": 2.0},
        {"step": 2, f"eval_{value}": 0.75, "eval_loss": 1.0, "epoch": 1.0},
    ]
    (path / "figures").mkdir(parents=True)
    (path / "figures" / (value.replace("/", " ") + ".png")).write_bytes(b"")
    (plain := folder / (value.replace("/", " ") + " plain")).mkdir()
    log = [{"step": 2, f"eval_{value}": 0.7, "train_runtime": 1.0}]
    (plain / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 2}))
    run.card_baseline = plain
    return run


@dataclass
class Cards:
    """The card of one value: written first, written over that one, and with a command that holds the value."""

    value: str
    first: ModelCard
    again: ModelCard
    command: ModelCard


def cards_with(folder: Path, value: str) -> Cards:
    method = replace(METHODS["ssam"], name=value, summary=f"A method: {value}.")
    asked = {"dataset": [value, "b"], "dataset_tags": [value], "model_name": value, "license": value}
    with pytest.MonkeyPatch.context() as patch:
        run = run_with(folder, value)
        patch.setattr(type(run.args), "method", lambda self: method)
        patch.setattr("hf_ssam.hub.model_card.repeat_command", lambda *a: None)
        first, again = (card_of(run, **asked, tags=[value]) for _ in range(2))
        patch.setattr("hf_ssam.hub.model_card.repeat_command", lambda *a: f"python run.py '{value}'")
        return Cards(value, first, again, card_of(run, **asked))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return cards_with(tmp_path_factory.mktemp("plain"), "word").first


@pytest.fixture(scope="module", params=NASTY.values(), ids=NASTY)
def nasty(request, tmp_path_factory):
    return cards_with(tmp_path_factory.mktemp("nasty"), request.param)


def test_card_has_the_structure_of_a_plain_one(plain, nasty):
    assert tokens(nasty.first.text) == tokens(plain.text)
    assert nasty.first.text.endswith("```\n")


def test_card_shows_the_value_as_it_is(plain, nasty):
    body, words = shown(nasty.first.text), spaced(nasty.value)
    assert f"on {words} and b with" in body and f"A method: {words}." in body
    assert body.count(words) >= shown(plain.text).count("word") - 10


def test_front_matter_holds_the_literal_string(nasty):
    front = yaml.safe_load(nasty.first.content.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert front["datasets"] == [nasty.value] and front["license"] == nasty.value
    assert nasty.value in front["tags"] and "owned" not in front["tags"]
    [index] = front["model-index"]
    assert index["name"] == nasty.value
    [result] = index["results"]
    assert result["dataset"] == {"name": nasty.value, "type": nasty.value}
    assert nasty.value in [metric["type"] for metric in result["metrics"]]
    assert set(front) <= {"library_name", "license", "tags", "datasets", "model-index", "metrics", "pipeline_tag"}


def test_a_card_written_over_a_card_says_the_same(nasty):
    assert str(nasty.again) == str(nasty.first)


def test_a_command_stays_in_its_block(nasty):
    blocks = [t for t in PARSER.parse(nasty.command.text) if t.type == "fence"]
    assert [t.info for t in blocks] == ["python", "python", "bash", "bibtex"]
    assert blocks[2].content == in_a_block(f"python run.py '{nasty.value}'")


def test_names_in_the_snippet_are_python_strings(nasty):
    blocks = PARSER.parse(nasty.first.text)
    loading, calling, repeating = [t.content for t in blocks if t.type == "fence" and t.info == "python"]
    said = {}
    exec(loading.split("\n")[2], {}, said)
    assert said["name"] == nasty.value
    compile(loading, "loading", "exec")
    assert ast.literal_eval(ast.parse(calling).body[1].value.args[0].func.keywords[0].value) == nasty.value
    compile(repeating, "repeating", "exec")


@pytest.mark.parametrize("value", NASTY.values(), ids=NASTY)
def test_text_code_and_cells_are_seen_as_they_are(value):
    for written in (text(value), code(value)):
        assert "\n" not in written
        assert spaced(shown(f"x {written} y")) == spaced(f"x {spaced(value)} y")
    table = f"| a | b |\n|---|---|\n| {cell(value)} | {code(value)} |\n"
    cells = [t for t in PARSER.parse(table) if t.type == "inline"]
    assert len(cells) == 4
    assert [shown_inline(t) for t in cells[2:]] == [spaced(value)] * 2
    [block] = [t for t in PARSER.parse(f"before\n\n{fenced(value, 'text')}\n\nafter") if t.type == "fence"]
    assert (block.info, block.content) == ("text", in_a_block(value.rstrip()))


def in_a_block(content: str) -> str:
    return PARSER.parse(f"~~~~~~~~\n{content}\n~~~~~~~~")[0].content


def shown_inline(token) -> str:
    return "".join(child.content for child in token.children if child.type != "html_inline")


def test_fields_of_a_plain_run_have_no_escapes():
    for plain in ("trec", "eval_loss", "me/toy-films", "f1 (macro)", "0.5", "a-b, c", "q_proj"):
        assert text(plain) == cell(plain) == plain and code(plain) == f"`{plain}`"
