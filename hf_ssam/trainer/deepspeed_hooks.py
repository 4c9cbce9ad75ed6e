"""What we lean on in DeepSpeed, and in Accelerate where that drives it; a part of the table in `trainer/host.py`."""

from __future__ import annotations

from .hook import Hook

ENGINE = "deepspeed.DeepSpeedEngine"
ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_FEATURE = "what two passes have not been seen to work with is refused"
_PLACE = "where a parameter lies in the partitions"

DEEPSPEED_HOOKS = (
    Hook(
        "accelerate.Accelerator",
        "deepspeed_engine_wrapped",
        "reads",
        (),
        "where `backward` finds the engine, and takes its step",
    ),
    Hook(
        "accelerate.utils.deepspeed.DeepSpeedEngineWrapper",
        "backward",
        "overrides",
        ("loss", "sync_gradients", "kwargs"),
        "the step waits for the second pass",
    ),
    Hook(
        "accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper",
        "__has_overflow__",
        "reads",
        (),
        "whether a skipped step is looked for, so that the scheduler is held back",
    ),
    Hook(ENGINE, "set_gradient_accumulation_boundary", "calls", ("is_boundary",), "the last micro-batch of a window"),
    Hook(ENGINE, "backward", "calls", (), "a pass over a micro-batch"),
    Hook(ENGINE, "step", "calls", (), "the step, once the descent gradient stands there"),
    Hook(ENGINE, "fp16_enabled", "calls", (), "whether the engine scales losses and skips steps by itself"),
    Hook(ENGINE, "zero_optimization_stage", "calls", (), _FEATURE),
    Hook(ENGINE, "autotp_size", "calls", (), _FEATURE),
    Hook(ENGINE, "torch_autocast_enabled", "calls", (), _FEATURE),
    Hook(ENGINE, "managed_gradient_accumulation", "calls", (), _FEATURE),
    Hook(ENGINE, "has_moe_layers", "reads", (), _FEATURE),
    Hook(ENGINE, "enable_backward_allreduce", "reads", (), _FEATURE),
    Hook(ENGINE, "basic_optimizer", "reads", (), "without ZeRO it is the optimizer itself"),
    Hook(ZERO, "cpu_offload", "reads", (), _FEATURE),
    Hook(ZERO, "low_precision_master_weights_and_grads", "reads", (), _FEATURE),
    Hook(ZERO, "overflow", "reads", (), "set where a step is skipped"),
    Hook(ZERO, "loss_scale", "reads", (), "what the gradient of a pass is a multiple of"),
    Hook(ZERO, "averaged_gradients", "reads", (), "the reduced gradients, where the step reads them"),
    Hook(ZERO, "all_grad_tensors", "reads", (), "what earlier micro-batches of a window have left"),
    Hook(ZERO, "zero_grad", "calls", ("set_to_none",), "a step that died leaves no gradient"),
    Hook(ZERO, "single_partition_of_fp32_groups", "reads", (), "the master weights"),
    Hook(ZERO, "bit16_groups_flat", "reads", (), "the weights that the model computes with"),
    Hook(ZERO, "update_lp_params", "calls", (), "those follow the master weights"),
    Hook(ZERO, "bit16_groups", "reads", (), "which parameters are stepped"),
    Hook(ZERO, "params_in_partition", "reads", (), _PLACE),
    Hook(ZERO, "partition_size", "reads", (), _PLACE),
    Hook(ZERO, "grad_partition_insertion_offset", "reads", (), _PLACE),
    Hook(ZERO, "grad_start_offset", "reads", (), _PLACE),
    Hook(ZERO, "get_param_id", "calls", ("param",), _PLACE),
    Hook(ZERO, "dp_process_group", "reads", (), "the ranks that hold the partitions"),
)
"""Every such name."""
