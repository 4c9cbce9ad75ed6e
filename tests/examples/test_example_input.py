"""What the examples refuse, in one sentence, before a model is loaded; and what they go on with."""

from __future__ import annotations

import json
import os

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import run_clm
import run_image_classification
import run_sft
import run_summarization
import run_token_classification
from hf_ssam import SSAMTrainer
from support import offline, offline_tasks, packing, tagging
from support.cli import UsageError

SENTENCES = {"tokens": [["who", "is", "bach"], ["where", "is", "peru"]] * 8, "ner_tags": [["O", "O", "B-X"]] * 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A BERT of 16 dimensions in a folder, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForTokenClassification(BertConfig(max_position_embeddings=64, **size)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(offline.minilm()).save_pretrained(folder)
    return folder


@pytest.fixture
def sentences(tmp_path):
    def write(name="train.json", **columns):
        path = tmp_path / name
        rows = Dataset.from_dict({**SENTENCES, **columns})
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return write


def pictures(folder, *names, content=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / name)
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def refused(main, *argv, says):
    with pytest.raises(UsageError, match=says) as caught:
        main([str(word) for word in argv])
    assert "\n" not in str(caught.value)


def test_image_folders_that_cannot_work(tmp_path):
    main, out = run_image_classification.main, ("--output_dir", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(main, "--train_dir", tmp_path / "empty", *out, says="empty holds no images")
    one = pictures(tmp_path / "one", "cat/1.png")
    refused(main, "--train_dir", one, *out, says="at least two: it has 1")
    (pictures(tmp_path / "half", "cat/1.png") / "dog").mkdir()
    refused(main, "--train_dir", tmp_path / "half", *out, says="dog holds no images")
    broken = pictures(pictures(tmp_path / "broken", "cat/1.png"), "dog/2.png", content=b"not a picture")
    refused(main, "--train_dir", broken, *out, says="2.png cannot be read .*: replace it or remove it")
    pets, other = (
        pictures(tmp_path / "pets", "cat/1.png", "dog/2.png"),
        pictures(tmp_path / "o", "cat/3.png", "eel/4.png"),
    )
    refused(main, "--train_dir", pets, "--validation_dir", other, *out, says="label 'eel', which the train data")
    refused(main, "--train_dir", pets, "--label_column_name", "kind", *out, says="no labels in column 'kind'")
    refused(main, "--train_dir", pets, "--image_column_name", "photo", *out, says="no images in column 'photo'")
    refused(
        main, "--train_dir", pets, "--eval_strategy", "epoch", *out, says="nothing to eval on: the data has 2 train"
    )


def test_an_image_folder_trains_and_a_picture_that_is_cut_short_is_named(tmp_path):
    pets = pictures(tmp_path / "pets", "cat/1.png", "dog/2.png")
    fixed = ["--image_size", "32", "--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    argv = ["--train_dir", str(pets), *fixed, "--output_dir", str(tmp_path / "out")]
    assert run_image_classification.main(argv)["ssam/total_passes"] == 2
    whole = (pets / "cat" / "1.png").read_bytes()
    (pets / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    argv[-1] = str(tmp_path / "second")
    refused(run_image_classification.main, *argv, says="1.png cannot be read")


def test_words_and_tags_that_do_not_fit(tmp_path, sentences, tiny):
    main, out = run_token_classification.main, ("--output_dir", tmp_path / "out")
    short = sentences("short.json", ner_tags=[["O", "O"]] * 16)
    refused(main, "--train_file", short, *out, says="example 1 of the train data has 3 words and 2 tags")
    flat = sentences("flat.json", tokens=["who is bach"] * 16)
    refused(main, "--train_file", flat, *out, says="needs lists of words and of tags")
    named = ("--label_column_name", "tags")
    refused(main, "--train_file", sentences(), *named, *out, says="no column 'tags', it has .* --label_column_name")
    refused(main, "--train_file", tmp_path / "no.json", *out, says="there is no file")
    long = ("--max_seq_length", 65, "--model_name_or_path", tiny)
    refused(
        main, "--train_file", sentences(), *long, *out, says="--max_seq_length 65 is out of range: bert reads 1 to 64"
    )
    gone = ("--model_name_or_path", tmp_path / "gone")
    refused(main, "--train_file", sentences(), *gone, *out, says="gone is neither a local folder nor")
    refused(main, "--do_predict", "true", *out, says="--do_predict")


def test_a_tokenizer_without_pad_and_end_token(tmp_path, sentences, tiny):
    folder = tmp_path / "nopad"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": None, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    os.link(tiny / "config.json", folder / "config.json")
    argv = ("--train_file", sentences(), "--model_name_or_path", folder, "--max_seq_length", 32)
    says = "has neither a pad nor an end token"
    refused(run_token_classification.main, *argv, "--output_dir", tmp_path / "out", says=says)


def test_text_that_cannot_be_used(tmp_path):
    out = ("--output_dir", tmp_path / "out")
    empty = tmp_path / "empty.txt"
    empty.touch()
    refused(run_clm.main, "--train_file", empty, *out, says="empty.txt is empty")
    rows = tmp_path / "rows.csv"
    rows.write_text("document,summary\nlong text,\n")
    refused(run_summarization.main, "--train_file", rows, *out, says="nothing in column 'summary' of example 1")
    refused(run_sft.main, "--train_file", rows, *out, says="needs messages, or prompt and completion, or text")
    with pytest.raises(UsageError, match="--lora_r -1 is not a rank"):
        run_clm.main(["--lora_r", "-1", "--output_dir", str(tmp_path)])


def test_packing_keeps_every_token_in_order_and_says_where_there_are_too_few(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(UsageError, match="has no end token to put between texts"):
        packing.packer(tokenizer, packing.RunningTextArguments())
    tokenizer.eos_token = "[SEP]"
    rows = Dataset.from_dict({"text": ["what is this", "who", "where is peru now"]})
    data = packing.RunningTextArguments(block_size=5)
    packed = packing.blocks(rows, tokenizer, data, None)
    flat = "what is this [SEP] who [SEP] where is peru now [SEP]".split()
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in packed["input_ids"]] == [flat[:5], flat[5:10]]
    assert packed["labels"] == packed["input_ids"]
    with pytest.raises(UsageError, match="less than one block: give a --block_size below 50"):
        packing.blocks(rows, tokenizer, packing.RunningTextArguments(block_size=50), None)


def test_the_perplexity_is_logged_before_and_after_training(tmp_path, tiny):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=30522, **size)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(tiny, eos_token="[SEP]").save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("who is bach\nwhere is peru\n")
    given = {
        "--model_name_or_path": tmp_path / "llama", "--output_dir": tmp_path / "out", "--block_size": 4,
        "--train_file": tmp_path / "text.txt", "--validation_file": tmp_path / "text.txt", "--max_steps": 1,
        "--eval_on_start": "true", "--report_to": "none", "--save_strategy": "no",
    }  # fmt: skip
    results = run_clm.main([str(word) for pair in given.items() for word in pair])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    before = next(entry for entry in log if "eval_loss" in entry)
    for found in (before, results):
        assert found["eval_perplexity"] == pytest.approx(np.exp(found["eval_loss"]))


def test_the_first_token_of_a_word_has_its_tag(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    encode = tagging.encoder(tokenizer, tagging.TokenArguments())
    encoded = encode({"tokens": [["who", "admires", "gymnophobia"]], "ner_tags": [[1, 1, 0]]})
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    kept = [(token, tag) for token, tag in zip(tokens, encoded["labels"][0], strict=True) if tag != -100]
    assert kept == [("who", 1), ("admire" if "admire" in tokens else "admires", 1), ("gym", 0)]


class Interrupted(Exception):
    """In place of Ctrl-C, which would end the test run."""


def test_an_interrupted_run_goes_on_where_it_was_saved(tmp_path, sentences, tiny, monkeypatch, capsys):
    """And ends as the run that was not interrupted; a new one does not write over it."""
    fixed = ["--train_file", sentences(), "--validation_file", sentences("v.json"), "--model_name_or_path", tiny]
    fixed += ["--max_seq_length", 32, "--max_steps", 4, "--save_steps", 2, "--save_strategy", "steps"]
    fixed += ["--report_to", "none", "--per_device_train_batch_size", 4, "--learning_rate", 0.01]

    def main(name, *argv):
        return run_token_classification.main([str(w) for w in [*fixed, "--output_dir", tmp_path / name, *argv]])

    whole = main("whole")
    step = SSAMTrainer.training_step

    def breaks(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise Interrupted
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SSAMTrainer, "training_step", breaks)
        with pytest.raises(Interrupted):
            main("cut")
    refused(main_of(main, "cut"), says="cut holds another run: go on with it by --resume_from_checkpoint true")
    resumed = main("cut", "--resume_from_checkpoint", "true")
    assert resumed["eval_loss"] == whole["eval_loss"] and resumed["ssam/total_passes"] == 8
    assert "s of training since step 2, where it was resumed" in capsys.readouterr().out
    assert "| Training time since the run was resumed at step 2 |" in (tmp_path / "cut" / "README.md").read_text()
    log = json.loads((tmp_path / "cut" / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["eval_loss"] == resumed["eval_loss"] and log[-2]["train_resumed_at"] == 2
    refused(main_of(main, "new", "--resume_from_checkpoint", "true"), says="there is no checkpoint in")


def main_of(main, *argv):
    return lambda _: main(*argv)


@pytest.mark.slow
def test_the_offline_tasks_follow_from_the_questions():
    names = offline_tasks.names()["train"]
    row = next(row for row in names if "halloween" in row["tokens"])
    assert row == {"tokens": ["what", "are", "halloween", "'s", "colors", "?"], "ner_tags": [0, 0, 1, 0, 0, 0]}
    types = offline_tasks.answer_types()["train"]
    assert len(set(types["summary"])) == 50  # each fine label has words of its own
    meanings = offline_tasks._meanings()
    assert meanings["LOC:city"] == "location: cities" and meanings["NUM:volsize"] == "numeric: size, area and volume"
    asked = offline_tasks.classified_questions()["test"]
    assert set(asked["completion"]) == {
        " abbreviation", " description", " entity", " human", " location", " numeric"
    }  # fmt: skip
    assert isinstance(offline_tasks.questions(), DatasetDict)
