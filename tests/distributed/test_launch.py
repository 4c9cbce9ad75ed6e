"""`accelerate launch` with the shipped configurations, and what is refused when distribution cannot work."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from hf_ssam import TwoPass
from hf_ssam.trainer import deferred_step
from hf_ssam.trainer.checks import refuse_static_graph
from tests.distributed.launching import HERE, ROOT, Runs, files_of, run
from tests.support.cases import assert_identical

pytestmark = pytest.mark.distributed

CONFIGS = ROOT / "configs" / "accelerate"
WORDS = ("a", "good", "bad", "fine", "dull", "film")


def launched(config: str, *command: str):
    return run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *command])


@pytest.mark.slow
def test_two_cpu_processes_of_accelerate_do_what_two_ranks_do(ddp: Runs, tmp_path):
    """The worker asserts that there are two processes."""
    name = "equal/rank/ssam/adamw_torch"
    done = launched("cpu_two_processes.yaml", str(HERE / "ddp_worker.py"), str(tmp_path), name)
    assert done.returncode == 0, done.stderr[-3000:]
    for file, theirs in zip(files_of(tmp_path, name), ddp[name], strict=True):
        assert_identical(torch.load(file, weights_only=False)["weights"], theirs["weights"])


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> list[str]:
    """The text classification script with a model of 16 dimensions and 16 rows of text."""
    folder = tmp_path_factory.mktemp("example")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=16, max_position_embeddings=32, **sizes))
    model.save_pretrained(folder / "model")
    BertTokenizer(str(vocabulary)).save_pretrained(folder / "model")
    rows = [f"a {word} film,{word}" for word in WORDS[1:5]] * 4
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]))
    given = {
        "--model_name_or_path": folder / "model", "--train_file": folder / "train.csv",
        "--validation_file": folder / "train.csv", "--output_dir": folder / "out", "--optim": "ssam",
        "--num_train_epochs": 1, "--per_device_train_batch_size": 4, "--logging_steps": 1, "--report_to": "none",
        "--disable_tqdm": "true", "--use_cpu": "true",
    }  # fmt: skip
    return [str(ROOT / "examples" / "run_text_classification.py"), *(str(w) for pair in given.items() for w in pair)]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [("cpu.yaml", 1), ("cpu_two_processes.yaml", 2)])
@pytest.mark.parametrize("scope", ["global", "rank"])
def test_the_example_runs_under_accelerate(example, config, processes, scope, tmp_path):
    """16 rows in batches of 4 are 4 steps in one process and 2 in two."""
    done = launched(config, *example, "--output_dir", str(tmp_path), "--ascent_scope", scope)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [e for e in log if "ssam/scale" in e]
    assert len(steps) == 4 // processes
    assert all(e["ssam/perturbed_steps"] == 1 and e["ssam/passes"] == 2 for e in steps)
    BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", "NO", 1),
        ("single_gpu", "NO", 1),
        ("multi_gpu", "MULTI_GPU", 2),
        ("fsdp2", "FSDP", 2),
        ("deepspeed_zero2", "DEEPSPEED", 2),
    ],
)
def test_the_other_configurations_are_read(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == DistributedType(kind)
    assert config.num_processes == processes
    assert config.use_cpu == (name == "cpu")
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {
        "cpu", "cpu_two_processes", "deepspeed_zero2", "fsdp2", "multi_gpu", "single_gpu",
    }  # fmt: skip


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_static_graph_is_refused_where_passes_vary(group):
    model = DistributedDataParallel(torch.nn.Linear(2, 1), static_graph=True)
    refuse_static_graph(model, varies=False)
    with pytest.raises(ValueError, match="ddp_static_graph: the graph is not static here.*leave ddp_static_graph off"):
        refuse_static_graph(model, varies=True)
    refuse_static_graph(DistributedDataParallel(torch.nn.Linear(2, 1)), varies=True)


def test_an_error_before_the_first_forward_of_shards_shows_itself(group):
    two_pass = TwoPass(fully_shard(torch.nn.Linear(2, 1)), "ssam", 0.1)

    def broken() -> torch.Tensor:
        raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        two_pass.step(broken)
    assert not two_pass.is_open


def test_layers_sharded_one_by_one_defer_their_reduction(group):
    """Shards with no root in common: each of them is told to wait."""
    layers = torch.nn.Sequential(*(fully_shard(torch.nn.Linear(3, 3)) for _ in range(2)))
    two_pass = TwoPass(layers, "ssam", 0.1)
    synchronised = []

    def seen() -> torch.Tensor:
        states = [layer._get_fsdp_state()._fsdp_param_groups[0].reduce_grads for layer in layers]
        synchronised.append(states)
        loss = layers(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    two_pass.step([seen, seen])
    assert synchronised == [[False, False], [True, True]] * 2


def in_deepspeed(**given: Any) -> SimpleNamespace:
    """A Trainer as far as the check before its engine is made looks at it."""
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=SimpleNamespace(zero_stage=given.get("stage", 2)),
        parallelism_config=SimpleNamespace(sp_enabled=given.get("sp_size", 1) > 1, sp_size=given.get("sp_size", 1)),
    )
    args = SimpleNamespace(optim="ssam", suggest_rho=given.get("suggest_rho", False))
    return SimpleNamespace(accelerator=accelerator, args=args)


@pytest.mark.parametrize(
    ("given", "installed", "said"),
    [
        ({}, "0.19.7", "optim=ssam reads gradients of DeepSpeed 0.19.8, and this is 0.19.7; `pip install"),
        ({"stage": 3}, "0.20.0", "does not support ZeRO stage 3.*set stage 2, as configs/accelerate/deepspeed_zero2"),
        ({"sp_size": 2}, "0.19.8", r"sequence parallelism \(sp_size=2\); leave it out"),
        ({"suggest_rho": True}, "0.19.8", "suggest_rho: it takes plain steps.*pass rho="),
    ],
)
def test_deepspeed_is_refused_where_two_passes_do_not_work(monkeypatch, given, installed, said):
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    with pytest.raises(NotImplementedError, match=said):
        deferred_step.refuse_deepspeed(in_deepspeed(**given))


def test_deepspeed_is_taken_where_two_passes_work(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.8")
    for stage in (0, 1, 2):
        deferred_step.refuse_deepspeed(in_deepspeed(stage=stage))
