"""The examples' command line: a file of values, flags over it, mistakes as one sentence."""

import pytest

from hf_ssam import SSAMTrainingArguments
from support.cli import ExampleParser, UsageError, run


def parse(*argv):
    return ExampleParser([SSAMTrainingArguments], description="").parse([str(word) for word in argv])[0]


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_flags_override_the_file_and_the_file_overrides_the_defaults(config):
    path = config("output_dir: here\nrho: 0.2\nseed: 7\noptim: asam\n")
    args = parse(path, "--rho", "0.1", "--optim=sgd")
    assert (args.output_dir, args.rho, args.seed, args.optim) == ("here", 0.1, 7, "sgd")
    assert parse("--config", path).rho == parse(f"--config={path}").rho == 0.2


def test_a_value_in_the_file_is_read_as_the_flag_would_be(config):
    args = parse(config("learning_rate: 1e-3\nnum_train_epochs: 3\nbf16: false\neval_on_start: true\nseed: 5\n"))
    assert (args.learning_rate, args.num_train_epochs, args.seed) == (1e-3, 3.0, 5)
    assert [type(value) for value in (args.learning_rate, args.num_train_epochs, args.seed)] == [float, float, int]
    assert args.eval_on_start is True and args.bf16 is False


def test_file_reads_no_as_a_word_and_a_single_value_as_a_list(config):
    from support.text_data import TextArguments

    path = config("text_column_names: article\neval_strategy: no\nbf16: no\ndo_train: yes\noutput_dir: on\n")
    data, args = ExampleParser([TextArguments, SSAMTrainingArguments], description="").parse([str(path)])
    assert data.text_column_names == ["article"]
    assert (args.eval_strategy, args.bf16, args.do_train, args.output_dir) == ("no", False, True, "on")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--rhoo", "1"], "unknown flag --rhoo: did you mean --rho?"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--rho", "-1"], "rho"),
        (["--optim", "ssma"], "there is no `ssma`; did you mean `ssam`?"),
        (["no.yaml"], "there is no configuration file no.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argv, sentence):
    with pytest.raises(UsageError) as error:
        parse(*argv)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rhoo: 1", "sets 'rhoo', which is not a flag: did you mean rho?"),
        ("rho: : 1", "is not valid YAML"),
        ("- rho", "must hold lines of the form `flag: value`"),
        ("seed: abc", "invalid int value: 'abc'"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(config, text, sentence):
    with pytest.raises(UsageError) as error:
        parse(config(text))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_the_user_can_mend_exits_with_status_2_and_a_bug_keeps_its_traceback(capsys):
    def usage():
        raise UsageError("give less")

    def bug():
        raise KeyError("x")

    with pytest.raises(SystemExit) as exit_:
        run(usage)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: give less\n"
    with pytest.raises(KeyError):
        run(bug)


def test_help_shows_ours_and_the_usual_flags_and_all_of_them_when_asked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # argparse wraps at the width of the terminal
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            parse(flag)
        assert end.value.code == 0
        shown[flag] = capsys.readouterr().out
    assert all(
        name in shown["--help"] for name in ("--rho", "--optim ", "--suggest_rho", "--learning_rate", "--help_all")
    )
    assert "--torch_compile_mode" in shown["--help_all"] and "--torch_compile_mode" not in shown["--help"]
    assert shown["--help"].count("\n") < 140 < 300 < shown["--help_all"].count("\n")
    titles = [shown["--help"].index(f"\n{title}:\n") for title in ("sharpness-aware training", "training")]
    assert titles[0] < shown["--help"].index("--rho ") < titles[1] < shown["--help"].index("--learning_rate ")
    assert "(default: " in shown["--help"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--optim_args", "momentum=0.9", "--base_optim", "sgd"], "sgd has one: base_optim_args=momentum=0.9"),
        (["--optim_args", "momentum=0.9"], "those of the base optimizer go into base_optim_args"),
        (["--optim", "ssamm"], "there is no `ssamm`; did you mean `ssam`"),
        (["--log_ssam", "some"], "log_ssam"),
    ],
)
def test_mistake_about_our_flags_names_the_way_out(argv, sentence):
    with pytest.raises(UsageError) as error:
        parse(*argv)
    assert sentence in str(error.value) and len(str(error.value)) < 300


def test_flag_that_has_no_effect_with_a_stock_optimizer_is_named():
    with pytest.warns(UserWarning, match="rho=0.1: no effect with the stock optimizer optim=adamw_torch"):
        parse("--optim", "adamw_torch", "--rho", "0.1")
