"""What a push decides without the network: whether a repository holds something else, and how to push later."""

from __future__ import annotations

import shlex

import pytest
from peft import LoraConfig, get_peft_model

from hf_ssam.hub.push import later_command, other_content
from tests.support.cases import bert

WHOLE = ["config.json", "model.safetensors"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
BERT = {"architectures": ["BertForSequenceClassification"]}


def adapted():
    return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))


@pytest.mark.parametrize(
    ("files", "config", "build", "other"),
    [
        ([], {}, bert, None),
        (["README.md", ".gitattributes"], {}, bert, None),
        (WHOLE, BERT, bert, None),
        (ADAPTER, {}, adapted, None),
        (ADAPTER, {}, bert, "an adapter, not a whole model"),
        (WHOLE, BERT, adapted, "a whole model, not an adapter"),
        (WHOLE, {"architectures": ["GPT2LMHeadModel"]}, bert, "GPT2LMHeadModel, not BertForSequenceClassification"),
        (["data.csv", "notes.txt"], {}, bert, "2 files that no Trainer wrote, such as data.csv"),
    ],
)
def test_a_repository_with_other_content_is_recognised(files, config, build, other):
    assert other_content(files, config, build()) == other


@pytest.mark.parametrize("revision", [None, "try"])
@pytest.mark.parametrize("private", [None, True])
def test_the_command_that_pushes_later_has_the_branch_and_the_visibility(revision, private):
    words = shlex.split(later_command("me/model", "my out", revision, private))
    assert words[:5] == ["hf", "upload", "me/model", "my out", "."]
    assert ("--private" in words) == bool(private)
    assert (words[words.index("--revision") + 1] if "--revision" in words else None) == revision
