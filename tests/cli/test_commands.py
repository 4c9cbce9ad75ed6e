"""`hf-ssam`: what it prints, and that bad input is one sentence."""

from __future__ import annotations

import functools
import json
import operator
import re
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset
from PIL import Image
from transformers import BertTokenizerFast

from hf_ssam import METHODS, SSAMTrainer, get_method
from hf_ssam.cli import COMMANDS, main, pages, rho
from hf_ssam.sharpness import suggest_rho
from tests.plots.test_plots import LOG
from tests.support.cases import arguments, bert, text_data
from tests.test_architecture import ROOT

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved classifier, and a table of texts with its labels."""
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    network = bert(seed=1)
    network.config.id2label, network.config.label2id = dict(enumerate("xyz")), {c: i for i, c in enumerate("xyz")}
    network.save_pretrained(root / "first")
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "first")
    rows = {"text": ["a b c", "d e", "f g h i", "j", "k l m", "n o"] * 4, "label": ["x", "y", "z"] * 8}
    Dataset.from_dict(rows).to_csv(root / "rows.csv")
    return root


def state(folder, log=LOG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 20}))
    return str(folder)


def test_command_without_words_lists_the_commands_before_torch_is_loaded():
    code = "import sys; from hf_ssam.cli import main; main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(re.search(rf"^  {name} ", done.stdout, re.M) for name in COMMANDS)


HELP = """
import contextlib, sys
from hf_ssam.cli import main
with contextlib.suppress(SystemExit):
    main([sys.argv[1], "--help"])
sys.exit(f"loaded: {sys.modules.keys() & {'torch', 'transformers', 'datasets', 'numpy'}}")
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_command_says_what_its_flags_are_before_torch_is_loaded(name):
    done = subprocess.run([sys.executable, "-c", HELP, name], cwd=ROOT, capture_output=True, text=True)
    assert f"usage: hf-ssam {name}" in done.stdout and done.stderr == "loaded: set()\n"


MISTAKES = [
    (["plots"], "there is no command plots: did you mean plot?"),
    (["xyz"], "there is no command xyz: methods, method, rho, plot, card, sharpness"),
    (["method", "ssma"], "there is no method ssma: did you mean ssam?"),
    (["method", "qqqq"], "`hf-ssam methods` lists them"),
    (["methods", "--like", "zzz"], "--like zzz: no method has it in its name"),
    (["plot"], "the following arguments are required: RUN"),
    (["plot", "/nowhere"], "/nowhere: there is no trainer_state.json"),
    (["card", "/nowhere"], "/nowhere: there is no _card.json"),
    (["rho", "m", "--method", "ssma"], "--method ssma does not exist"),
    (["rho", "m", "--batches", "0"], "--batches 0"),
    (["rho", "m", "--optim_args", "x=1"], "method `ssam` has no option `x`"),
    (["rho", "/nowhere/model"], "/nowhere/model is neither a local folder nor to be had from the Hub"),
    (["sharpness", "m", "--k", "one"], "argument --k: invalid int value: 'one'"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_mistake_is_one_sentence_and_status_2(words, sentence, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_methods_are_all_in_the_table_with_when_to_choose_them(capsys):
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    for method in METHODS.values():
        line = next(line for line in lines if line.split()[0:1] == [method.name])
        assert method.when and line.endswith(method.when) and f" {method.rho:g} " in line


def test_methods_like_a_word(capsys):
    main(["methods", "--like", "Momentum"])
    out = capsys.readouterr().out
    assert "momentum_sam" in out and "looksam" not in out


def test_table_has_short_links_costs_and_no_option_that_all_share():
    table = pages.table()
    assert "[Foret et al. 2021](https://arxiv.org/abs/2010.01412)" in table and "renormalize=False" not in table
    assert "`renormalize=true`" in pages.row(METHODS["ssam"]) and "max_scale" not in table
    assert "| 1 + 1/k |" in pages.row(METHODS["looksam"]) and "`k=5`" in pages.row(METHODS["looksam"])
    assert METHODS["usam"].paper.short == "Andriushchenko and Flammarion 2022"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_page_of_a_method_has_equation_options_cost_paper_and_when(name, capsys):
    main(["method", name])
    page, method = capsys.readouterr().out, METHODS[name]
    assert method.summary in page and method.when in page and method.paper.bibtex in page
    assert re.search(r"^\s*(d|e|every|between).*[=g]", page.split("## Equation")[1], re.M)
    assert all(
        f"- `{n}={pages.written(o)}` ({o.range})" in page.replace("\n  ", " ") for n, o in method.options.items()
    )
    assert f"costs {method.passes} forward-backward pass" in page
    assert ("Experimental" in page) is bool(method.experimental)


@pytest.mark.slow
def test_plot_of_a_run_and_of_two(tmp_path, capsys, monkeypatch):
    run = state(tmp_path / "a" / "run")
    assert main(["plot", run]) == 0
    assert Image.open(tmp_path / "a" / "run" / "figures" / "training_curves.png").format == "PNG"
    monkeypatch.chdir(tmp_path)
    main(["plot", run, state(tmp_path / "b" / "run")])
    assert Image.open(tmp_path / "comparison.png").size[0] > 1000
    main(["plot", run, "--output", str(tmp_path / "page.png")])
    assert f"drawn: {tmp_path}/page.png" in capsys.readouterr().out and (tmp_path / "page.png").is_file()


def test_rho_is_the_librarys_for_the_rows_of_the_file(model, capsys):
    words = [str(model / "first"), "--data", str(model / "rows.csv"), "--batches", "3", "--batch_size", "8"]
    found = rho.main([*words, "--method", "sam"])[0]
    assert len(found.losses) == 3 and found.method == "sam"
    out = capsys.readouterr().out
    assert f"first on 3 batches of 8 rows of {model.name}/rows.csv" in out
    assert f"--optim sam --rho {found.rho:g}: its ascent raises the loss by 10%" in out
    for radius, rises in found.rises.items():
        assert f"| {radius:.2g} | {sum(rises) / 3:.1%} |" in out
    with_options = rho.main([*words, "--optim_args", "adaptive=true"])[0]
    assert with_options.rho > 3 * found.rho


def test_rho_of_the_command_is_that_of_the_function(model, capsys, monkeypatch):
    seen = []

    def spy(network, batches, method, **given):
        seen.append((batches, method))
        return suggest_rho(network, batches, method, **given)

    monkeypatch.setattr("hf_ssam.sharpness.suggest_rho", spy)
    rho.main([str(model / "first"), "--data", str(model / "rows.csv"), "--batches", "2", "--batch_size", "4"])
    ((batches, method),) = seen
    assert [len(b["labels"]) for b in batches] == [4, 4] and method == get_method("ssam")


def test_flags_offer_the_measures_that_there_are():
    from hf_ssam.cli import measures, sharpness

    assert tuple(measures.MEASURES) == sharpness.MEASURES


@pytest.mark.slow
def test_sharpness_is_measured_by_the_same_command(model, tmp_path, capsys):
    words = ["sharpness", str(model / "first"), "--data", str(model / "rows.csv"), "--output_dir", str(tmp_path)]
    assert main([*words, "--measures", "eigenvalues", "--no_figures"]) == 0
    assert "| first |" in capsys.readouterr().out and (tmp_path / "sharpness.json").is_file()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    trainer = SSAMTrainer(
        bert(),
        arguments(output_dir=str(folder), base_optim="sgd"),
        train_dataset=text_data(),
        eval_dataset=text_data(8),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_state()
    trainer.create_model_card()
    return folder


def test_card_is_drawn_anew_with_its_figure_and_without_a_change(finished):
    before = (finished / "README.md").read_text()
    assert "![training curves](figures/training_curves.png)" in before
    (finished / "figures" / "training_curves.png").unlink()
    assert main(["card", str(finished)]) == 0
    assert (finished / "README.md").read_text() == before
    assert Image.open(finished / "figures" / "training_curves.png").format == "PNG"


def test_card_is_compared_with_a_run_of_the_plain_optimizer(finished, tmp_path):
    log = [{"step": 20, "train_runtime": 1.0}, {"step": 20, "eval_loss": 0.25, "epoch": 1.0}]
    assert main(["card", str(finished), "--baseline", state(tmp_path / "plain", log)]) == 0
    text = (finished / "README.md").read_text()
    assert "after, with the plain optimizer" in text and "| 0.25 |" in text
    assert "Training time of the plain optimizer (run `plain`) | 1 s" in text


def test_card_of_a_run_that_has_ended_is_drawn_without_transformers(finished):
    code = "import sys; from hf_ssam.cli import main; main(sys.argv[1:]); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "card", str(finished)], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("missing", [("cost", "resumed_at"), ("tags",)], ids=".".join)
def test_card_of_another_version_is_refused_and_stays(finished, tmp_path, capsys, missing):
    older = shutil.copytree(finished, tmp_path / "older")
    facts = json.loads((older / "_card.json").read_text())
    *path, name = ("facts", *missing)
    del functools.reduce(operator.getitem, path, facts)[name]
    (older / "_card.json").write_text(json.dumps(facts))
    before = (older / "README.md").read_text()
    assert main(["card", str(older)]) == 2
    assert "another version of hf_ssam left it" in capsys.readouterr().err
    assert (older / "README.md").read_text() == before


def test_card_without_its_facts_or_with_damaged_ones_is_refused(tmp_path, capsys):
    (tmp_path / "_card.json").write_text("{")
    assert main(["card", str(tmp_path)]) == 2
    assert "the file is damaged" in capsys.readouterr().err
