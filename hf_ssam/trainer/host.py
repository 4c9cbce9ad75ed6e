"""What we lean on in the Trainer, in Accelerate and in torch, beyond what they promise to keep.

A private name may move with any release, and a public method that we override may grow a parameter. Each is named here
with the reason, and `tests/trainer/test_host_contract.py` fails in a second where one is gone, has other parameters,
or is used and not named. What the mixins ask of the Trainer that they are mixed into is in `Host`, their base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .deepspeed_hooks import DEEPSPEED_HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import Trainer as ParentTrainer
    from transformers import TrainerState, TrainingArguments

    from ..engine.two_pass import TwoPass
    from .checkpoints import Settings
    from .step_log import StepLog
    from .training_args import SSAMArgumentsMixin

    class ParentArguments(TrainingArguments):
        """Once they are checked."""

        output_dir: str

else:
    ParentTrainer = ParentArguments = object

READ_IN = {"transformers": "5.23.0", "accelerate": "1.15.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
"""The versions in which the hooks below were read."""

TRAINER = "transformers.Trainer"
ACCELERATOR = "accelerate.Accelerator"
GRADIENT_STATE = "accelerate.state.GradientState"
DDP = "torch.nn.parallel.DistributedDataParallel"
FSDP = "torch.distributed.fsdp.FSDPModule"
_MANY = "one call for many tensors (law 7)"
_FOREACH = (
    "abs_",
    "add",
    "add_",
    "addcmul_",
    "clone",
    "copy_",
    "div",
    "lerp_",
    "maximum_",
    "mul",
    "mul_",
    "norm",
    "sqrt",
)
HOOKS = (
    # The run: the engine is built, steps, and is saved here.
    Hook(
        TRAINER,
        "_prepare_for_training",
        "overrides",
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "the engine is built on the prepared model, and the checkpoint's state is loaded",
    ),
    Hook(
        TRAINER,
        "training_step",
        "overrides",
        ("model", "inputs", "num_items_in_batch"),
        "one micro-batch; the parent's runs once a pass",
    ),
    Hook(
        TRAINER,
        "_save_optimizer_and_scheduler",
        "overrides",
        ("output_dir",),
        "our part of a checkpoint, before the Trainer's last file",
    ),
    Hook(
        TRAINER,
        "train",
        "overrides",
        ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        "half-written checkpoints are passed over, and the hooks are watched",
    ),
    Hook(TRAINER, "_save_checkpoint", "overrides", ("model", "trial"), "an earlier save's proof goes first"),
    Hook(TRAINER, "_get_output_dir", "calls", ("trial",), "the folder that the checkpoint is in"),
    Hook(TRAINER, "_save", "overrides", ("output_dir", "state_dict"), "training_args.bin is pickled without secrets"),
    Hook(TRAINER, "log", "overrides", ("logs", "start_time"), "the step report joins the entry with the loss"),
    # The optimizer.
    Hook(TRAINER, "create_optimizer", "overrides", ("model",), "the base optimizer's name is given inside"),
    Hook(TRAINER, "create_optimizer_and_scheduler", "overrides", ("num_training_steps",), "the same"),
    Hook(TRAINER, "get_optimizer_cls_and_kwargs", "overrides", ("args", "model"), "the base optimizer's class"),
    Hook(
        "accelerate.optimizer.AcceleratedOptimizer",
        "_is_overflow",
        "reads",
        (),
        "set where a step that is not finite is skipped, so that the Trainer holds the scheduler back",
    ),
    # Batches.
    Hook(
        TRAINER, "get_train_dataloader", "overrides", (), "dataset indices ride along for methods that score samples"
    ),
    Hook(
        TRAINER,
        "_get_collator_with_removed_columns",
        "overrides",
        ("data_collator", "description"),
        "the column of indices survives the collator that drops unused ones",
    ),
    Hook(
        TRAINER,
        "get_batch_samples",
        "overrides",
        ("epoch_iterator", "num_batches", "device"),
        "the first batch tells whether the loss heeds num_items_in_batch",
    ),
    Hook(TRAINER, "_get_num_items_in_batch", "calls", ("batch_samples", "device"), "the count, once that is mended"),
    Hook(TRAINER, "loss_is_scaled_for_ga", "reads", (), "whether a Trainer has said how its loss is scaled"),
    Hook(TRAINER, "label_smoother", "reads", (), "whether the loss is the model's own"),
    Hook(TRAINER, "_prepare_inputs", "calls", ("inputs",), "a forward that nobody sees, on the Trainer's device"),
    Hook(TRAINER, "_loss_shifts_labels", "reads", (), "how many labels of a micro-batch the loss counts"),
    # Weights that move and come back.
    Hook("torch._C", "_storage_Use_Count", "calls", (), "weights that nobody else looks at change places"),
    Hook("torch.UntypedStorage", "_cdata", "reads", (), "which memory is asked about"),
    # A pass that is run again.
    Hook(TRAINER, "_defer_fsdp_gradient_reduction", "calls", (), "micro-batches before the last, loaded sharded"),
    Hook(TRAINER, "current_gradient_accumulation_steps", "reads", (), "a micro-batch's share of the step"),
    Hook(TRAINER, "current_flos", "reads", (), "second passes are counted as computation"),
    Hook(TRAINER, "is_distributed_loading_by_transformers", "reads", (), "whether FSDP2 sharded it at load time"),
    Hook(
        GRADIENT_STATE,
        "_set_sync_gradients",
        "calls",
        ("sync_gradients",),
        "a replayed micro-batch runs in the state of its first pass; hooks on sharded LoRA read it",
    ),
    Hook(GRADIENT_STATE, "plugin_kwargs", "reads", (), "sync_each_batch"),
    Hook(ACCELERATOR, "no_sync", "calls", ("model",), "micro-batches before the last"),
    Hook(ACCELERATOR, "scaler", "reads", (), "the loss scale, as a tensor on the device"),
    # Ranks.
    Hook(DDP, "require_forward_param_sync", "reads", (), "a second pass must not take rank 0's buffers anew"),
    Hook(DDP, "gradient_as_bucket_view", "reads", (), "whether a second pass overwrites the first one's gradients"),
    Hook(DDP, "find_unused_parameters", "reads", (), "which gradients may be missing"),
    Hook(DDP, "static_graph", "reads", (), "refused where steps differ in their passes"),
    Hook(DDP, "_join_config", "reads", (), "joined uneven inputs are refused"),
    Hook(DDP, "process_group", "reads", (), "the ranks that hold a replica"),
    Hook(FSDP, "set_requires_gradient_sync", "calls", ("requires_gradient_sync",), "what no_sync is to DDP"),
    Hook(FSDP, "unshard", "calls", (), "gradients that a dead pass left on gathered weights are dropped"),
    Hook(FSDP, "reshard", "calls", (), "the same"),
    Hook("torch._utils", "_flatten_dense_tensors", "calls", ("tensors",), "one collective a bucket"),
    Hook("torch._utils", "_unflatten_dense_tensors", "calls", ("flat", "tensors"), "one collective a bucket"),
    # Tensors and modules.
    *(Hook("torch", f"_foreach_{operation}", "calls", (), _MANY) for operation in _FOREACH),
    Hook("torch.Tensor", "_version", "reads", (), "whether a tensor was written to"),
    Hook("torch.Tensor", "_post_accumulate_grad_hooks", "reads", (), "optimizers that step in backward are refused"),
    Hook("torch.nn.Module", "_buffers", "reads", (), "buffers are put back, by slot"),
    Hook("torch.nn.modules.batchnorm", "_BatchNorm", "reads", (), "layers that normalise by running statistics"),
    Hook("torch.autograd.function.FunctionMeta", "_forward_cls", "reads", (), "which custom backward has no second"),
    # The Hub.
    Hook(
        TRAINER,
        "create_model_card",
        "overrides",
        (
            "language",
            "license",
            "tags",
            "model_name",
            "finetuned_from",
            "tasks",
            "dataset_tags",
            "dataset",
            "dataset_args",
        ),
        "the card of a sharpness-aware run",
    ),
    Hook(
        TRAINER, "evaluate", "overrides", ("eval_dataset", "ignore_keys", "metric_key_prefix"), "metrics for the card"
    ),
    Hook(TRAINER, "init_hf_repo", "overrides", ("token", "private"), "the repository is checked before the run"),
    Hook(
        TRAINER,
        "push_to_hub",
        "overrides",
        ("commit_message", "blocking", "token", "revision", "private", "kwargs"),
        "the card is pushed with the weights",
    ),
    Hook(TRAINER, "_push_from_checkpoint", "overrides", ("checkpoint_folder",), "the same, from a checkpoint"),
    *DEEPSPEED_HOOKS,
)
"""Every such name. A method that was renamed is not called any more: `HookGuardMixin` notices that in a run."""


class Host(ParentTrainer):
    """The Trainer that a mixin is mixed into, and what the mixins hold in common.

    To the type checker a `transformers.Trainer` whose arguments are ours; when it runs, a class with `two_pass` alone.

    Attributes:
        two_pass: the engine, built anew whenever training starts; None with a stock optimizer.
    """

    args: SSAMArgumentsMixin
    accelerator: Accelerator
    state: TrainerState
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    callback_handler: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: bool
    current_flos: Any
    current_gradient_accumulation_steps: Any
    hub_model_id: Any
    push_in_progress: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    is_model_parallel: bool
    is_distributed_loading_by_transformers: bool

    two_pass: TwoPass | None = None
    _settings: Settings
    _step_log: StepLog
