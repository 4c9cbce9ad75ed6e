"""What cannot work, said in one sentence with the way out, before the first batch (law 9)."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.trainer_utils import has_length
from transformers.utils import is_sagemaker_mp_enabled

from ..engine.parameters import deepspeed_engine, trainable
from ..methods.adasam import AdaSAM
from .deferred_step import refuse_deepspeed

_NEXT_BATCH = "its step takes the next batch of a buffer, so the second pass would see other samples"
_GENERATES = "its step lets the model generate, so the second pass would see other samples"
_WEIGHTS_ARE_SENT = "others generate its samples with the weights of each moment, which are not w in the second pass"

HOSTS = {
    "GRPOTrainer": _NEXT_BATCH,
    "RLOOTrainer": _NEXT_BATCH,
    "DistillationTrainer": _NEXT_BATCH,
    "GOLDTrainer": _NEXT_BATCH,
    "IWOPDTrainer": _NEXT_BATCH,
    "SDFTTrainer": _NEXT_BATCH,
    "SDPOTrainer": _NEXT_BATCH,
    "A2POTrainer": _GENERATES,
    "GKDTrainer": _GENERATES,
    "OnlineDPOTrainer": _GENERATES,
    "AsyncGRPOTrainer": _WEIGHTS_ARE_SENT,
    "AsyncDistillationTrainer": _WEIGHTS_ARE_SENT,
}
"""Trainers whose `training_step` cannot be called twice for one batch, and why. What they have in common with trainers
that are not listed is noticed in the first perturbed step (`refuse_other_samples`)."""


def refuse_host(trainer_class: type) -> None:
    """Refuse a parent trainer whose steps cannot be repeated.

    Raises:
        NotImplementedError: if one of `HOSTS` is among the bases.
    """
    for base in trainer_class.__mro__:
        if base.__name__ in HOSTS:
            raise NotImplementedError(
                f"{base.__name__} cannot train with two passes: {HOSTS[base.__name__]}; use SFTTrainer, DPOTrainer or "
                f"RewardTrainer under SSAMTrainerMixin, or a stock `optim` with {base.__name__} itself."
            )


def refuse_other_samples(trainer_class: type) -> None:
    """Refuse a Trainer whose second pass has been seen to call the model on other samples than the first.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"{trainer_class.__name__} cannot train with two passes: its second pass called the model with other "
        "samples than the first, as a step does that generates, takes the next batch or counts its own calls; draw "
        "samples in the data set or the collator, or use a stock `optim`."
    )


def refuse_optimizer(optimizer: Any) -> None:
    """Refuse a sharpness-aware wrapper passed as `optimizers=`: its step needs a closure that no Trainer gives.

    Raises:
        ValueError: if it takes two steps of its own, or is named after SAM.
    """
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, AdaSAM):
        return
    bases = type(optimizer).__mro__
    two_steps = {"first_step", "second_step"} & {attribute for base in bases for attribute in vars(base)}
    if two_steps or any(re.search(r"SAM(?![a-z])", base.__name__) for base in bases):
        raise ValueError(
            f"optimizers: {type(optimizer).__name__} wraps an optimizer to take two steps of its own, which the "
            "Trainer cannot drive; pass the plain optimizer, or none, and set optim='ssam' and rho=…."
        )


def refuse_steps_in_backward(model: nn.Module) -> None:
    """Refuse a model whose parameters run code of the user's own as soon as their gradient is there.

    Such code steps an optimizer to save memory, in the first pass already. Hooks of torch, Transformers, Accelerate
    and DeepSpeed average gradients over ranks.

    Raises:
        ValueError: naming the first parameter with such a hook.
    """
    for name, p in model.named_parameters():
        if any(not _is_of_a_library(hook) for hook in (p._post_accumulate_grad_hooks or {}).values()):
            raise ValueError(
                f"model: `{name}` has a hook that runs after each backward (register_post_accumulate_grad_hook), "
                "where an optimizer steps before the second pass exists; remove it, and the Trainer's optimizer steps."
            )


def _is_of_a_library(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(hook.__module__).partition(".")[0] in ("torch", "transformers", "accelerate", "deepspeed")


def refuse_launch(trainer: Any) -> None:
    """Refuse kinds of distribution under which a second pass is not the same function, or has no gradient to give.

    Raises:
        NotImplementedError: for FSDP version 1, SageMaker model parallelism, `nn.DataParallel` and some of DeepSpeed.
    """
    args = trainer.args
    if args.n_gpu > 1 and not trainer.is_model_parallel:
        raise NotImplementedError(
            f"optim={args.optim} does not support nn.DataParallel ({args.n_gpu} GPUs in one process); start one "
            f"process a GPU: `accelerate launch --multi_gpu --num_processes {args.n_gpu} script.py …`, or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    refuse_deepspeed(trainer)
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise NotImplementedError(
            f"optim={args.optim} does not support FSDP version 1, whose flat parameters have no names of their own; "
            "set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does."
        )
    if is_sagemaker_mp_enabled():
        raise NotImplementedError(
            f"optim={args.optim} does not support SageMaker model parallelism; use FSDP2 or one process a GPU instead."
        )


def refuse_static_graph(model: nn.Module, varies: bool) -> None:
    """Refuse a static DDP graph where the number of passes changes from step to step.

    Raises:
        ValueError: if DDP was told that every iteration is alike and they are not.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.static_graph and varies:
            raise ValueError(
                "ddp_static_graph: the graph is not static here, since steps differ in their passes (ascent_interval, "
                "ascent_start, ascent_scope or the method); leave ddp_static_graph off, or perturb every step."
            )


def refuse_static_shapes(trainer: Any, cuts: bool) -> None:
    """Refuse a compiler that was told that all batches are of one size, where the method cuts them.

    Raises:
        ValueError: if shapes are static and `cuts` holds.
    """
    if cuts and trainer.args.torch_compile and not trainer.accelerator.state.dynamo_plugin.dynamic:
        raise ValueError(
            f"torch_compile: it is set to static shapes, and optim={trainer.args.optim} runs on parts of a batch; set "
            "ACCELERATE_DYNAMO_USE_DYNAMIC=true in the environment, or leave torch_compile off."
        )


def refuse_shared_samples(trainer: Any, cuts: bool) -> None:
    """Refuse methods that pick samples where ranks hold parts of the same ones.

    Raises:
        NotImplementedError: under tensor, context or sequence parallelism, if `cuts` holds.
    """
    config = trainer.accelerator.parallelism_config
    if cuts and config is not None and (config.tp_enabled or config.cp_enabled or config.sp_enabled):
        raise NotImplementedError(
            f"optim={trainer.args.optim} runs on parts of a batch, which ranks of tensor, context and sequence "
            "parallelism would have to cut alike; choose a method that uses whole batches, such as ssam, or data "
            "parallelism."
        )


def refuse_empty(dataset: Any) -> None:
    """Refuse a training set with nothing in it.

    Raises:
        ValueError: if its length is known and 0.
    """
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset: it is empty, so there is nothing to train on; pass at least one sample.")


def same_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What of `model` trains, and what else `optimizer` steps: a loss of sentence-transformers may have weights."""
    named = trainable(model)
    if deepspeed_engine(model) is not None:  # what its optimizer steps are flat copies
        return named
    known = {id(p) for p in named.values()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    return {**named, **{f"outside_model.{i}": p for i, p in enumerate(others)}}
