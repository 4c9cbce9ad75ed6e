"""What is broken on purpose: where, how, and who has to notice; one line an entry."""

# ruff: noqa: E501
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change of one place.

    Attributes:
        file: below `hf_ssam`.
        why: what goes wrong then.
        old: stands there exactly once.
        new: what it becomes.
        tests: files or test ids of which one has to fail.
        equivalent: why no test can notice it; empty where one can.
    """

    file: str
    why: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


NOT_FINITE = ("tests/engine/test_not_finite.py",)
SHARES = ("tests/engine/test_micro_batch_shares.py",)
KEPT = ("tests/methods/test_kept_state.py",)
ON_LORA = ("tests/methods/test_adapters.py",)
NOISE = ("tests/rules/test_noise.py",)
BUDGET = ("tests/rules/test_budget.py",)
FUNCTIONAL = ("tests/methods/test_functional_sam.py",)
NORMS = ("tests/rules/test_norms.py",)
VECTORS = ("tests/rules/test_vectors.py",)
MASKS = ("tests/rules/test_masks.py",)
DESCENT = ("tests/rules/test_descent.py", "tests/rules/test_orthogonal.py")
ADAPTIVE = ("tests/rules/test_adaptive.py",)
PLACES = ("tests/engine/test_displacement.py",)
AUTOCAST = ("tests/engine/test_autocast_cache.py",)
TWO_PASS = "tests/engine/test_two_pass.py::"
REFERENCE = (TWO_PASS + "test_every_method_follows_its_float64_reference",)
PRECISION = ("tests/engine/test_precision.py::test_an_overflow_leaves_the_methods_state_untouched",)
SAMPLES = ("tests/engine/test_per_sample.py", "tests/engine/test_labels.py")
BATCHES = ("tests/engine/test_batches.py",)
SELECTION = (
    "tests/engine/test_selection.py::test_exactly_as_many_are_kept_also_on_ties",
    "tests/engine/test_selection.py::test_losses_are_compared_under_the_same_dropout",
    "tests/engine/test_selection.py::test_a_look_draws_what_the_call_drew_and_leaves_no_trace",
    "tests/engine/test_selection.py::test_risen_and_unseen_samples_are_drawn_more_often",
)
BUFFERS = ("tests/engine/test_replay.py::test_a_buffer_that_is_replaced_is_put_back_too",)
GENERATORS = ("tests/engine/test_replay_state.py::test_state_moves_once_a_step",)
SCHEDULES = (
    "tests/trainer/test_schedules.py::test_ascent_steps_count_from_the_first",
    "tests/trainer/test_schedules.py::test_the_first_ascent",
    "tests/trainer/test_schedules.py::test_a_ratio_is_the_nearest_step",
    "tests/trainer/test_schedules.py::test_rho_follows_the_share_of_the_first_groups_own_rate",
)
CHECKPOINTS = ("tests/trainer/test_checkpoints.py::test_checkpoints_are_sorted_by_step",)
VECTOR_FILES = (
    "tests/trainer/test_vector_files.py::test_a_file_of_another_save_is_named",
    "tests/trainer/test_vector_files.py::test_files_that_lack_a_shard_are_named",
)
IDS = ("tests/trainer/test_sample_ids.py::test_sample_ids_belong_to_their_rows",)
DOUBLE = ("tests/sharpness/test_double_backward.py",)
SHARP = "tests/sharpness/test_sharpness.py::"
ONE = "tests/sharpness/test_one_function.py::"
OBJECTIVE = (ONE + "test_batches_weigh_by_the_labels_that_their_loss_counts",)
RISE = (
    SHARP + "TestAscentSharpness::test_closed_form_of_one_step",
    SHARP + "TestAscentSharpness::test_m_sharpness_is_the_mean_over_shards",
)
EDGES = (
    SHARP + "TestEdges::test_closed_forms",
    SHARP + "TestEdges::test_ssam_is_gradient_descent_along_the_eigenvector",
)
CALLBACK = ("tests/trainer/test_sharpness_callback.py::test_rho_is_that_of_the_next_perturbed_step",)
LEFT_OUT = (
    "tests/trainer/test_sharpness_callback.py::test_ascent_gradient_is_left_out_where_the_gradient_does_not_tell_the_perturbation[momentum_sam]",
)

# fmt: off
RULES = (
    Mutation("rules/tensors.py", "a sum lacks what only the second has", "if n in sums else u[n] for n in u}, **rest}", "if n in sums else u[n] for n in u}}", VECTORS),
    Mutation("rules/tensors.py", "a sum forgets what its first vector is a multiple of", " or own != 1 or not dense", " or not dense", VECTORS),
    Mutation("rules/tensors.py", "tensors are added by their position", "[tensors[n] for n in both], own", "[tensors[n] for n in tensors if n in u], own", VECTORS),
    Mutation("rules/tensors.py", "the host asks a device whether a factor is one", "if isinstance(own, Tensor) or isinstance(factor", "if isinstance(factor", ("tests/engine/test_precision.py::test_the_engine_reads_no_value_back",)),
    Mutation("rules/space.py", "a norm lacks what is left over by whole pieces", "vector_norm(part[whole:]", "vector_norm(part[:0]", NORMS),
    Mutation("rules/space.py", "short tensors get each other's norms", "torch._foreach_norm(short, 2,", "torch._foreach_norm(short[::-1], 2,", NORMS),
    Mutation("rules/noise.py", "every piece of a tensor gets the same mask", "random_(-(2**63), None, generator=generator).view(torch.int16)", "random_(-(2**63), None, generator=torch.Generator(t.device)).view(torch.int16)", NOISE),
    Mutation("rules/space.py", "norms of squares that float32 cannot hold", "~((each > SAFE[0]) & (each < SAFE[1]))", "each != each", NORMS),
    Mutation("rules/space.py", "gradients that later micro-batches lack are lost", "self.params[name].grad = earlier[name]", "pass", SHARES),
    Mutation("rules/space.py", "a gradient written beside the one that is there", "torch._foreach_copy_([present[n] for n in moved], [tensors[n] for n in moved])", "pass", VECTORS + DESCENT),
    Mutation("rules/ascent.py", "T on names that are `weight` alone", '"weight" in n]', 'n.rsplit(".", 1)[-1] == "weight"]', ADAPTIVE),
    Mutation("rules/ascent.py", "no epsilon under the norm", "1.0 / (context.norm(v) + EPS))", "1.0 / context.norm(v))", (TWO_PASS + "test_a_zero_gradient_stays_zero",)),
    Mutation("rules/descent.py", "γ without its limit", "max=max_scale)", "max=math.inf)", ("tests/rules/test_renormalize.py",)),
    Mutation("rules/descent.py", "rounding noise taken for a direction", "> _rounding(v, context))", "> 0 * _rounding(v, context))", DESCENT),
    Mutation("rules/descent.py", "the noise of the coarsest tensor for all", "for t in parts(v)[0].values()], dtype=norms.dtype)", "for t in parts(v)[0].values()], dtype=norms.dtype).amax()", DESCENT),
    Mutation("rules/context.py", "an average that starts at zero", "copied({n: v[n] for n in v if n not in before})", "scaled({n: v[n] for n in v if n not in before}, 0.0)", REFERENCE),
    Mutation("rules/masks.py", "names that come later have no mask", "or any(n not in mask for n in v):", "or not mask:", KEPT),
    Mutation("rules/masks.py", "an overflow at the first refresh turns the ascent off", "mask[n] | unknown.to(mask[n].device)", "mask[n]", MASKS),
    Mutation("rules/masks.py", "ties beyond the count", "(place <= room.to(place.device))", "(place <= room.to(place.device) + 1)", MASKS),
    Mutation("rules/selection.py", "7.000000000000001 is eight samples", "math.ceil(round(share * size, 9))", "math.ceil(share * size)", SELECTION),
    Mutation("rules/state.py", "what a spoiled step staged is kept", "return new if known else", "return new if True else", PRECISION),
    Mutation("rules/noise.py", "noise of the same length at every width", "for n in drawn]\n        scales", "for n in []]\n        scales", NOISE),
    Mutation("rules/noise.py", "every step draws alike", "(seed * 1_000_003 + context.step)", "(seed * 1_000_003)", NOISE),
    Mutation("rules/rows.py", "rows of a transposed weight are its inputs", "output = 1 if name in space.transposed else 0", "output = 0", NOISE),
    Mutation("rules/budget.py", "no longest perturbation", "torch.minimum(rise / (_slope(v, context) + EPS), longest)", "rise / (_slope(v, context) + EPS)", BUDGET),
    Mutation("rules/state.py", "one micro-batch's overflow takes nothing back", "if commits > 1:", "if commits > 2:", PRECISION),
)

METHODS = (
    Mutation("methods/friendly_sam.py", "σ before the first average", "sigma * context.state.filled(\"average\")", "sigma", KEPT),
    Mutation("methods/momentum_sam.py", "the norm of all of the momentum", "restricted(context.state.read(\"momentum\"), context.w)", "context.state.read(\"momentum\")", KEPT),
    Mutation("methods/momentum_sam.py", "momentum of a parameter that came later", "**seen, **new}", "**seen}", KEPT),
    Mutation("methods/looksam.py", "no epsilon under a layer's norm", "1.0 / (norms + EPS), 0.0)", "1.0 / norms, 0.0)", KEPT),
    Mutation("methods/looksam.py", "a second pass at other steps", "second_pass=every(k)", "second_pass=every(k + 1)", REFERENCE),
    Mutation("methods/ausam.py", "a sample drawn twice counts once", "times, total = same.sum(1), same @ rises.float()", "times, total = torch.ones_like(same[0]), rises.float()", KEPT),
    Mutation("methods/ausam.py", "samples never seen are drawn least", "torch.where(seen & (span > 0), (mean - low) / span, 1.0)", "torch.where(seen & (span > 0), (mean - low) / span, 0.0)", SELECTION),
    Mutation("methods/stale_sam.py", "the gradient that is kept is the host's", "**copied(v)}", "**v}", KEPT),
    Mutation("methods/bar.py", "a skipped step is balanced", "finite.to(grows.device, grows.dtype) * (context.rho * context.lr)", "context.rho * context.lr", ON_LORA),
    Mutation("methods/bar.py", "the product changes by more", "1 - a * sign])", "1 / (1 + a * sign)])", ON_LORA),
    Mutation("methods/flat_lora.py", "noise by the rows of W alone", "+ (change * b).sum(dim=1)", "", ON_LORA),
    Mutation("rules/noise.py", "large noise from the process's generator", "words[:n].random_(-(2**63), None, generator=generator)", "words[:n].random_(-(2**63), None)", NOISE),
    Mutation("rules/noise.py", "two numbers drawn at once that correlate", "(y - shared * x) / math.sqrt(1 - shared**2)", "(y + 0.02 * x)", NOISE),
    Mutation("methods/flat_lora.py", "row norms in the precision of autocast", "enabled=False", "enabled=True", ON_LORA),
    Mutation("methods/flat_lora.py", "all layers draw alike", "self._number + index", "self._number", ON_LORA),
    Mutation("methods/bi_lora.py", "the clip scales each factor by the whole ratio", "torch.sqrt(torch.clamp(context.rho / (length + EPS), max=1.0))", "torch.clamp(context.rho / (length + EPS), max=1.0)", ON_LORA),
    Mutation("methods/bi_lora.py", "a first step that is skipped ends the ascent", "torch.where(begun.to(first.device), kept.to(first), first)", "kept.to(first)", ON_LORA),
    Mutation("rules/noise.py", "a random part that is not unbiased", "factor * LEVELS / limit", "factor", ("tests/methods/test_trajectories.py",)),
)

ENGINE = (
    Mutation("engine/ranks.py", "a second group beside one that moves host memory", 'if "cpu:gloo" in dist.get_backend_config(group):', "if False:", ("tests/distributed/test_ddp.py",)),
    Mutation("engine/gradients.py", "a second pass overlooks the loss", "finite(window.loss, ascent_loss, context.grad_norm, ascent_grad_norm)", "finite(ascent_loss, context.grad_norm, ascent_grad_norm)", NOT_FINITE),
    Mutation("engine/gradients.py", "a second pass overlooks the ascent loss", "finite(window.loss, ascent_loss, context.grad_norm, ascent_grad_norm)", "finite(window.loss, context.grad_norm, ascent_grad_norm)", NOT_FINITE),
    Mutation("engine/gradients.py", "a second pass overlooks the ascent norm", "finite(window.loss, ascent_loss, context.grad_norm, ascent_grad_norm)", "finite(window.loss, ascent_loss, context.grad_norm)", NOT_FINITE),
    Mutation("engine/gradients.py", "one pass overlooks the loss", "finite(window.loss, context.grad_norm)", "finite(context.grad_norm)", NOT_FINITE),
    Mutation("engine/gradients.py", "no radius overlooks the loss", "finite(window.loss, grad_norm)", "finite(grad_norm)", NOT_FINITE),
    Mutation("engine/gradients.py", "a GradScaler is not told of a spoiled step", "torch.where(finite, 1.0, torch.nan)", "torch.where(finite, 1.0, 1.0)", NOT_FINITE),
    Mutation("engine/gradients.py", "all weights move ahead, not the perturbed ones", "self.space.weights(self.perturbed), {}", "self.space.weights(), {}", KEPT),
    Mutation("engine/passes.py", "each micro-batch takes a copy", "        self._snapshot.release()\n", "", PLACES),
    Mutation("engine/passes.py", "each micro-batch takes other memory", "        self._workspace.take_back(self._elsewhere)\n", "", PLACES),
    Mutation("engine/passes.py", "a view that a pass left shows other weights", "if holders(elsewhere) > 1 + (p.data_ptr() == elsewhere.data_ptr()):", "if False:", PLACES),
    Mutation("engine/passes.py", "a parameter that left the other memory counts", "1 + (p.data_ptr() == elsewhere.data_ptr())", "2", PLACES),
    Mutation("engine/passes.py", "memory that became a weight's is lent again", "                self._workspace.give_away(elsewhere)\n", "", PLACES),
    Mutation("engine/passes.py", "a graph of other weights goes unnoticed", "torch.autograd.graph.increment_version(self._params)", "pass", PLACES),
    Mutation("engine/two_pass.py", "an interrupt leaves weights elsewhere", "        self._displacement.restore()\n", "", PLACES),
    Mutation("engine/passes.py", "weights move the wrong way elsewhere", "others.values(), float(factor * rho))", "others.values(), -float(factor * rho))", PLACES),
    Mutation("engine/passes.py", "the other memory is aligned otherwise", ", offset=t.data_ptr() % ALIGNMENT", "", PLACES),
    Mutation("rules/tensors.py", "memory of another alignment is lent", "dtype or like.dtype, offset", "dtype or like.dtype", PLACES),
    Mutation("engine/passes.py", "the length of a perturbation is waited for", "if not waits and", "if", PLACES),
    Mutation("rules/space.py", "weights that other processes map change places", " and not p.is_shared()", "", PLACES),
    Mutation("rules/space.py", "weights that somebody looks at change places", "and tensors_.holders(p) == holders", "", PLACES),
    Mutation("rules/space.py", "a part of a larger tensor changes places", "p.untyped_storage().nbytes() == p.nbytes and", "", PLACES),
    Mutation("rules/space.py", "weights of another kind change places", "is_plain = type(p) is nn.Parameter and", "is_plain =", PLACES),
    Mutation("rules/space.py", "what the step looks at counts", "1 + (n in known)", "1", PLACES),
    Mutation("engine/passes.py", "weights that a forward replaced stay", "        self._space.rebind(self._w)\n", "", PLACES),
    Mutation("rules/tensors.py", "memory is lent again while somebody reads it", "self._end(lambda t: id(t) in ended)", "self._end(lambda t: True)", PLACES),
    Mutation("engine/passes.py", "the second pass sees stale casts", "torch.clear_autocast_cache()  #", "pass  #", ("tests/engine/test_precision.py::test_the_second_pass_casts_the_perturbed_weights",)),
    Mutation("engine/passes.py", "casts of perturbed weights outlive the step", "self._moved = None\n            torch.clear_autocast_cache()", "self._moved = None", AUTOCAST),
    Mutation("engine/gradients.py", "a micro-batch climbs by its share", "else window.share", "else 1.0", SHARES),
    Mutation("engine/gradients.py", "a second pass counts nothing", "r.first + r.second", "r.first", (TWO_PASS + "test_the_report_says_what_happened",)),
    Mutation("engine/report.py", "one micro-batch's overflow is overlooked", "torch.stack(values(\"skipped\")).any()", "torch.stack(values(\"skipped\")).all()", PRECISION),
    Mutation("engine/replay.py", "private generators move on", "for generator, private in self._private:", "for generator, private in ():", GENERATORS),
    Mutation("engine/module_state.py", "buffers that a module replaced stay", "if module._buffers[name] is not tensor:", "if False:", BUFFERS),
    Mutation("engine/forward_recorder.py", "a look draws other dropout", "if seen.rng is not None:", "if seen.rng is None:", SELECTION),
    Mutation("engine/per_sample.py", "a sample without labels is NaN", ".sum(1).clamp(min=1)", ".sum(1)", SAMPLES),
    Mutation("engine/labels.py", "labels are counted unshifted", "batch[\"labels\"][..., 1:] if", "batch[\"labels\"][..., 0:] if", SHARES + SAMPLES),
    Mutation("engine/labels.py", "a loss of a model's own is taken for a causal one", "return \"loss_function\" in", "return True or \"loss_function\" in", SAMPLES),
    Mutation("engine/adapters.py", "a reference is perturbed", "return not module.disable_adapters and not module.merged and", "return not module.merged and", ON_LORA),
    Mutation("engine/adapters.py", "the second adapter climbs by the loss scale", "t.mul_(inverse_unit.to(t.device) if isinstance(inverse_unit, Tensor) else inverse_unit)", "pass", ON_LORA),
    Mutation("engine/adapters.py", "frozen layers stay replaced", "self._attributes.pop(\"forward\", None)", "pass", ON_LORA),
    Mutation("engine/adapters.py", "ranks ascend apart", "self._ranks.average_over_data(tensors)", "pass", ("tests/distributed/test_lora.py",)),
    Mutation("engine/logit_gradients.py", "a copy of the logits is asked", "while node is not None and node.name()", "while False and node.name()", FUNCTIONAL),
    Mutation("engine/logit_gradients.py", "the second pass keeps its own gradient", "lambda gradient: gradients[call].to(gradient.dtype)", "lambda gradient: None", FUNCTIONAL),
    Mutation("engine/gradients.py", "a micro-batch's loss is its share", "return window.loss / _share(window, self._ranks.scope)", "return window.loss", BUDGET),
    Mutation("engine/batches.py", "packed rows are cut as samples", "if len(value) != size:", "if len(value) < 0:", BATCHES),
)

TRAINER = (
    Mutation("trainer/micro_batches.py", "each pass counts its operations anew", "flos = self.flos if part is None else", "flos = float(self.trainer.floating_point_ops(self.inputs)) if part is None else", ("tests/trainer/test_trainer_features.py::test_operations_of_a_micro_batch_are_counted_once_for_all_of_its_passes",)),
    Mutation("trainer/micro_batches.py", "a second pass is not counted as computation", "self.trainer.current_flos += flos -", "self.trainer.current_flos -=", ("tests/trainer/test_trainer_features.py::test_total_flos_count_every_pass",)),
    Mutation("trainer/loss_counts.py", "a micro-batch's share is that of its samples", "return labels.ne(IGNORED).sum() * ranks / num_items", "return run.weight / self.current_gradient_accumulation_steps", SHARES),
    Mutation("trainer/loss_counts.py", "a part counts for its own labels alone", "num_items * count_labels(model, part) / count_labels(model, whole)", "num_items", SHARES),
    Mutation("trainer/schedules.py", "steps count from the run's first", "(step - start) % interval == 0", "step % interval == 0", SCHEDULES),
    Mutation("trainer/schedules.py", "a ratio is cut off", "min(round(start * max_steps), max_steps - 1)", "int(start * max_steps)", SCHEDULES),
    Mutation("trainer/mixin.py", "ρ follows the first rate given, not the group's", "(group.get(\"initial_lr\", self.args.learning_rate) or 1.0)", "self.args.learning_rate", SCHEDULES),
    Mutation("trainer/step_log.py", "skipped steps are averaged too", "+ torch.where(kept, value, 0.0)", "+ value", ("tests/engine/test_precision.py::test_skipped_steps_stay_out_of_the_averages",)),
    Mutation("trainer/checkpoints.py", "step 9 comes after step 10", "(int(m.group(1)), p) for p in found", "(m.group(1), p) for p in found", CHECKPOINTS),
    Mutation("trainer/vector_files.py", "files of two saves are mixed", "if found_id != save_id:", "if False:", VECTOR_FILES),
    Mutation("trainer/vector_files.py", "a lost shard is not missed", "if read[key] != local(tensor).numel():", "if False:", VECTOR_FILES),
    Mutation("trainer/sample_ids.py", "every sample is the first", "torch.tensor([row[ID] for row in rows])", "torch.tensor([rows[0][ID] for row in rows])", IDS),
    Mutation("trainer/sharpness_callback.py", "ρ of this step, perturbed or not", "return next(filter(None, radii), 0.0)", "return next(radii, 0.0)", CALLBACK),
    Mutation("trainer/sharpness_callback.py", "Momentum-SAM measured along the gradient", "rules.second_pass.interval is None or rules.per_example", "rules.per_example", LEFT_OUT),
)

SHARPNESS = (
    Mutation("sharpness/double_backward.py", "torch's own weight_norm is differentiated", "(_weight_norm if function is torch._weight_norm else function)", "function", DOUBLE),
    Mutation("sharpness/symmetry.py", "asymmetry is let through", "if found > allowed:", "if False:", DOUBLE),
    Mutation("sharpness/symmetry.py", "u and v are one", "for seed in (0, 1))", "for seed in (0, 0))", DOUBLE),
    Mutation("sharpness/objective.py", "a mean of means", "visit(loss, leaves, items / self.total)", "visit(loss, leaves, 1 / 2)", OBJECTIVE),
    Mutation("sharpness/objective.py", "every pass draws other dropout", "            if self._draws is not None:\n                self._draws.restore()\n", "", (ONE + "test_draws_between_two_measurements_change_neither",)),
    Mutation("sharpness/ascent_gap.py", "shards count alike", "rise += share * (", "rise += (", RISE),
    Mutation("sharpness/ascent_gap.py", "a direction that is no unit vector", "length(scaled).clamp_min(", "length(scaled).clamp_min(1.0 + ", (ONE + "test_the_ball_has_the_same_radius_however_flat_the_loss_is",)),
    Mutation("sharpness/edges.py", "SSAM's edge without γ", "factor = self.scale if self.method == \"ssam\" else 1.0", "factor = 1.0", EDGES),
    Mutation("sharpness/lanczos.py", "the last vector is not taken out", "objective.add_product(q, out.mul_(-beta))", "objective.add_product(q, out.mul_(0.0))", (SHARP + "TestEigenvalues::test_exact_on_a_diagonal_quadratic",)),
    Mutation("sharpness/probe.py", "an iterator is read once and then empty", "if isinstance(batches, Iterator):", "if False:", (SHARP + "TestRefusals::test_batches_that_can_be_read_once",)),
)

HUB = (
    Mutation("hub/adapter_base.py", "the folder of the base model in a pushed adapter", "if base and config.is_file():", "if False:", ("tests/hub/test_model_card.py",)),
    Mutation("hub/push.py", "what is to be pushed by hand keeps the path", "self.is_to_be_pushed = True", "pass", ("tests/hub/test_model_card.py",)),
    Mutation("hub/push.py", "an adapter over a whole model", "if is_peft_model(model) != (\"adapter_config.json\" in content):", "if False:", ("tests/hub/test_push_decisions.py",)),
    Mutation("hub/push.py", "the command drops the branch", "words += [\"--revision\", revision] if revision else []", "words += []", ("tests/hub/test_push_decisions.py",)),
)

MUTATIONS = (*RULES, *METHODS, *ENGINE, *TRAINER, *SHARPNESS, *HUB)
