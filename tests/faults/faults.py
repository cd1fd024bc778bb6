"""Faults that the tests have to catch: what ``plant.py`` plants, and what pruning of tests is held to.

A new fault is one more entry: something that could go wrong in a line of code, and the cheapest tests that notice.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One replacement in one file."""

    name: str
    """Short, for the command line."""
    file: str
    """From the root of the checkout."""
    text: str
    """What stands there, once in the file."""
    replacement: str
    harm: str
    """What goes wrong for a user."""
    tests: tuple[str, ...]
    """pytest ids of the few tests that are to catch it, of a file, a function or one case of it."""
    interpreted: bool = False
    """Whether these need ``TRITON_INTERPRET=1``."""


def _kernel(name: str, file: str, text: str, replacement: str, harm: str, *tests: str) -> Fault:
    """Of device code; its tests run in the interpreter."""
    return Fault(name, f"kernels/{file}", text, replacement, harm, tests, interpreted=True)


def _fault(name: str, file: str, text: str, replacement: str, harm: str, *tests: str) -> Fault:
    return Fault(name, f"mope_fast/{file}", text, replacement, harm, tests)


_MIX, _ATTEND, _WINDOWS = (
    f"tests/kernels/test_{name}_kernels.py::" for name in ("route_and_mix", "prompt_attention", "window_attention")
)
_LAYER = "tests/kernels/test_layer_prompts_kernels.py::"
_MIX_EAGER = f"{_MIX}test_outputs_and_gradients_are_as_good_as_eager"
_TIES = "tests/properties/test_route_and_mix_properties.py::test_among_equal_logits_the_lower_index_is_kept"
_ATTEND_EAGER = f"{_ATTEND}test_float32_output_and_gradients_are_as_good_as_eager"
_ATTEND_COMPILES = "tests/aot/test_prompt_attention_compiles.py::test_compiles_and_fits"
_DENSE = "tests/test_attention_backends.py::test_output_and_gradients_are_those_of_the_dense_formula"
_STRIDES = "tests/test_attention_backends.py::test_queries_keys_and_values_may_have_any_strides"
_TIMM = "tests/encoders/test_timm_families.py::"
_TRANSFORMERS = "tests/encoders/test_transformers_families.py::"
_CONCATENATED = f"{_TRANSFORMERS}test_fusion_equals_the_librarys_layers_on_concatenated_prompts"
_RECOMPUTED = "tests/models/test_gradient_checkpointing.py::test_recomputing_gives_the_same_step_to_the_bit"
_OF_ITS_OWN = "tests/modules/test_prompt_bank.py::test_each_layer_has_keys_and_noise_of_its_own"
_JOINT = "tests/models/test_distributed.py::"
_SIDES = "tests/models/test_sides.py::"
_THREADS = "tests/models/test_threads.py::"
_FRONT_DOOR = "tests/models/test_front_door.py::test_hooks_on_a_timm_model_run_and_its_classifier_does_not"
_OTHER_ATTENTION = "tests/encoders/test_other_attention.py::"
_CHECK = "tests/encoders/test_check_encoder.py::"
_MECHANISMS = f"{_CHECK}test_each_way_to_attend_is_that_of_the_librarys_layers_on_the_concatenation"
_SAVES = "tests/models/test_checkpoint.py::"
_CACHE = "tests/data/test_feature_cache.py::"
_PICTURES = "tests/data/test_images.py::"
_JSONL = "tests/data/test_jsonl.py::"
_PUBLISHED = "tests/data/test_published.py::"
_CANCEL = "tests/properties/test_route_and_mix_properties.py::test_experts_that_cancel_have_finite_results_and_gradients"

# kernels of the router and of mixing
ROUTE_AND_MIX = (
    _kernel(
        "softmax-counts-tile-padding",
        "route_and_mix.py",
        'return tl.where((cols < K)[None, :], x, float("-inf"))',
        'return tl.where((cols <= K)[None, :], x, float("-inf"))',
        "An expert that does not exist takes part of the routing scores unless K fills a tile.",
        f"{_MIX_EAGER}[False-33-7-2-34-torch.float32]",
    ),
    _kernel(
        "kernel-gate-keeps-ties",
        "route_and_mix.py",
        "return (x < kth_value[:, None]) | ((x == kth_value[:, None]) & (cols[None, :] > kth_index[:, None]))",
        "return x < kth_value[:, None]",
        "Among equal logits more than top_k experts stay.",
        _TIES,
    ),
    _kernel(
        "gate-gradient-through-dropped-experts",
        "route_and_mix.py",
        "dx = p / tl.sum(p, 1)[:, None] * (tl.where(s == 0.0, 0.0, ds) - total)",
        "dx = p / tl.sum(p, 1)[:, None] * (ds - total)",
        "A sparse gate trains its router with the gradients of experts that were not used.",
        f"{_MIX}test_gates_are_as_good_as_eager[5-False-2-False]",
    ),
    _kernel(
        "router-gradient-without-norm",
        "route_and_mix.py",
        "g += _load_2d(gram_row, i, cols, K, K, (gram_strides[2], gram_strides[1]), ACC)",
        "g += 0.0",
        "In K/V space half of the router's gradient through the norm of the mixture is missing.",
        f"{_MIX}test_gradcheck_in_float64_goes_through_the_kernels[True-None-False]",
    ),
    _kernel(
        "experts-gradient-without-norm",
        "route_and_mix.py",
        "s *= tl.abs(tl.load(rstd_ptr + rows * L + row, mask=rows < B, other=0.0))[:, None]",
        "s *= tl.abs(tl.load(rstd_ptr + rows * L, mask=rows < B, other=0.0))[:, None]",
        "In K/V space every row of an expert takes its gradient with the norm of the first row.",
        f"{_MIX}test_gates_are_as_good_as_eager[5-True-2-True]",
    ),
    _kernel(
        "addresses-of-32-bits",
        "route_and_mix.py",
        "x = tl.load(logits_ptr + rows[:, None] * strides[0] + cols[None, :].to(tl.int64) * strides[1]",
        "x = tl.load(logits_ptr + rows[:, None] * strides[0] + cols[None, :] * strides[1]",
        "Logits in a view of more than 2^31 elements are read at wrong addresses.",
        f"{_MIX}test_addresses_past_2_31_elements[logits-1]",
    ),
    _kernel(
        "kernel-root-of-a-negative-norm",
        "route_and_mix.py",
        "below = norm_sq < 0.0",
        "below = norm_sq < -1e30",
        "Where experts cancel, rounding makes prompts mixed in K/V space NaN.",
        _CANCEL,
    ),
    Fault(
        "products-in-tf32",
        "kernels/products.py",
        'input_precision="ieee"',
        'input_precision="tf32"',
        "On a GPU float32 attention and mixing have the digits of TF32.",
        (
            "tests/aot/test_route_and_mix_compiles.py::test_compiles_for_other_layouts",
            "tests/aot/test_route_and_mix_compiles.py::test_compiles_and_fits[(1, 1, 1, 1, torch.float32, {})-80]",
        ),
    ),
)

# attention with prefixes and receptive fields: kernels, torch's own, fields
ATTENTION = (
    Fault(
        "tiles-larger-than-shared-memory",
        "kernels/launch.py",
        "256: (AttentionLaunch(64, 32, 8, 2)",
        "256: (AttentionLaunch(128, 128, 8, 3)",
        "With head dim 256 attention doesn't start on any GPU.",
        (f"{_ATTEND_COMPILES}[Dh=256-86]",),
    ),
    _kernel(
        "layer-routes-by-the-other-modality-alone",
        "route_and_mix.py",
        "x = dot(query, tl.load(at, mask=(own < OWN)[:, None] & (cols < K)[None, :], other=0.0).to(ACC), x)",
        "x += 0.0 * tl.sum(query)",
        "On a GPU routing ignores the layer's own feature.",
        f"{_LAYER}test_rows_scores_and_gradients_are_those_of_the_reference[no norm-all]",
    ),
    _kernel(
        "layer-copies-the-first-prompt",
        "route_and_mix.py",
        "at = from_ptr + rows[:, None] * strides[0] + row * strides[1] + columns[None, :] * strides[2]",
        "at = from_ptr + rows[:, None] * strides[0] + columns[None, :] * strides[2]",
        "On a GPU all static prompts of a layer are its first one.",
        f"{_LAYER}test_rows_scores_and_gradients_are_those_of_the_reference[nothing behind-all]",
    ),
    _kernel(
        "layer-shift-gradient-of-one-prompt",
        "route_and_mix.py",
        "_sum_grads(index, grad_shift_ptr, grad_ptr, P_BEFORE, L, L,",
        "_sum_grads(index, grad_shift_ptr, grad_ptr, P_BEFORE, 1, 1,",
        "The gradient of the projection's bias comes from the first prompt alone.",
        f"{_LAYER}test_rows_scores_and_gradients_are_those_of_the_reference[everything-all]",
    ),
    _kernel(
        "layer-parts-of-a-batch-in-one-place",
        "route_and_mix.py",
        "_store_2d(grad_weight_ptr + (of_part // d_tiles).to(tl.int64) * OWN * D, to_weight, own, columns, OWN, D)",
        "_store_2d(grad_weight_ptr, to_weight, own, columns, OWN, D)",
        "In large batches a router learns from a part of the samples.",
        f"{_LAYER}test_parts_of_a_batch_are_summed_behind_the_launches",
    ),
    Fault(
        "layer-cuts-a-wide-router",
        "mope_fast/ops/layer_prompts.py",
        "return weight.shape[0] > launches.MAX_OWN or experts.shape[0] > launches.MAX_ROUTED",
        "return experts.shape[0] > launches.MAX_ROUTED",
        "On a GPU a router uses the first numbers of a wide query only.",
        (f"{_LAYER}test_any_sizes_are_those_of_the_reference[own1]",),
        interpreted=True,
    ),
    _kernel(
        "layer-shift-of-the-wrong-columns",
        "route_and_mix.py",
        "acc += tl.load(shift_ptr + columns * shift_stride, mask=columns < M, other=0.0).to(ACC)[None, :]",
        "acc += tl.load(shift_ptr + tl.arange(0, BLOCK_M) * shift_stride, mask=columns < M, other=0.0).to(ACC)[None, :]",
        "Behind its first tile a mixture has another part of the projection's bias.",
        f"{_LAYER}test_any_sizes_are_those_of_the_reference[width dim]",
    ),
    _kernel(
        "causal-off-by-one",
        "prompt_attention.py",
        "last = tl.minimum(last, rows + (Sk - Sq) + right + 1)",
        "last = tl.minimum(last, rows + (Sk - Sq) + right + 2)",
        "Each token of a causal encoder sees the one behind it.",
        f"{_ATTEND}test_any_tiles_equal_the_reference[causal-16-16]",
    ),
    _kernel(
        "full-attention-sees-tile-padding",
        "prompt_attention.py",
        "there = numbers < tokens + prefixes",
        "there = numbers <= tokens + prefixes",
        "A key of zeros takes part of the attention unless the number of tokens fills a tile.",
        f"{_ATTEND}test_any_head_dim_is_as_good_as_eager[8-torch.float32]",
    ),
    _kernel(
        "window-off-by-one",
        "prompt_attention.py",
        "first = tl.maximum(first, rows + (Sk - Sq) - left)",
        "first = tl.maximum(first, rows + (Sk - Sq) - left + 1)",
        "Each token of a windowed layer misses the first one that it sees.",
        f"{_ATTEND_EAGER}[a window]",
    ),
    _kernel(
        "unmasked-tile-too-early",
        "prompt_attention.py",
        "seen_to = tl.maximum(begin, tl.minimum(Sk, first_row + (Sk - Sq) + right + 1))",
        "seen_to = tl.maximum(begin, tl.minimum(Sk, last_row + (Sk - Sq) + right + 1))",
        "In tiles that only some rows see whole, the others see too much.",
        f"{_ATTEND}test_any_tiles_equal_the_reference[causal-16-16]",
    ),
    _kernel(
        "masked-prefix-seen",
        "prompt_attention.py",
        "there = of_token | (in_prefix & _is_there(padding_ptr, numbers - tokens - prefixes, in_prefix))",
        "there = of_token | in_prefix",
        "A prompt that a sample does not have takes part of its attention.",
        f"{_ATTEND_EAGER}[shared keys, padding, masked prefixes]",
    ),
    _kernel(
        "masked-prefix-gets-a-gradient",
        "prompt_attention.py",
        "                _mask_of_prefix(token_padding_ptr, P0 + P1, MASKED_PREFIXES), statistics_ptr",
        "                None, statistics_ptr",
        "A prompt that a sample does not have is trained by it.",
        f"{_ATTEND_EAGER}[shared keys, padding, masked prefixes]",
    ),
    _kernel(
        "shared-keys-of-the-wrong-head",
        "prompt_attention.py",
        "    of_keys = head // GROUP\n    first_row = pid % tiles * BLOCK_Q\n    rows = first_row + tl.arange(0, BLOCK_Q)\n"
        "    inside = rows < Sq\n    q_tile",
        "    of_keys = head % (H // GROUP)\n    first_row = pid % tiles * BLOCK_Q\n    rows = first_row + tl.arange(0, BLOCK_Q)\n"
        "    inside = rows < Sq\n    q_tile",
        "Of grouped keys each head of queries sees another's.",
        f"{_ATTEND_EAGER}[shared keys, a causal window, masked prefixes, bias, negative scale]",
    ),
    _kernel(
        "shared-keys-trained-by-one-head",
        "prompt_attention.py",
        "        head = of_keys * GROUP + member\n        q_head, g_head = _head(q_ptr, q_strides, batch, head), "
        "_head(grad_out_ptr, grad_out_strides, batch, head)\n        bias_head",
        "        head = of_keys * GROUP\n        q_head, g_head = _head(q_ptr, q_strides, batch, head), "
        "_head(grad_out_ptr, grad_out_strides, batch, head)\n        bias_head",
        "Keys that several heads share get the first one's gradient several times.",
        f"{_ATTEND_EAGER}[shared keys, gaps]",
    ),
    _kernel(
        "scale-left-out-of-the-largest",
        "prompt_attention.py",
        "        tile_max *= scale_log2\n",
        "        pass\n",
        "The online softmax subtracts something else than the largest exponent: it may overflow.",
        f"{_ATTEND}test_large_logits_choose_one_key",
    ),
    _kernel(
        "online-softmax-forgets-to-fade",
        "prompt_attention.py",
        "return dot(p, v, acc * fade[:, None]), new_max, row_sum * fade + tl.sum(p, 1)",
        "return dot(p, v, acc * fade[:, None]), new_max, row_sum + tl.sum(p, 1)",
        "Where a later tile of keys has the largest product, attention weights add up to less than one.",
        f"{_ATTEND}test_any_tiles_equal_the_reference[causal-16-16]",
    ),
    _kernel(
        "key-gradients-skip-the-diagonal",
        "prompt_attention.py",
        "return tl.maximum(0, first_key - (Sk - Sq) - right), Sq\n",
        "return tl.maximum(0, first_key - (Sk - Sq) - right + 1), Sq\n",
        "In causal attention some keys miss the gradient of their own query.",
        f"{_ATTEND}test_any_tiles_equal_the_reference[causal-16-16]",
    ),
    _kernel(
        "prefix-gradient-without-scale",
        "prompt_attention.py",
        "_store_rows(to_k, keys, keys < P, grads_strides[2:], grad_k * scale, HEAD_DIM, BLOCK_D)",
        "_store_rows(to_k, keys, keys < P, grads_strides[2:], grad_k, HEAD_DIM, BLOCK_D)",
        "Prompts' keys get gradients that are larger by the root of the head dimension.",
        f"{_ATTEND}test_gradcheck_in_float64_goes_through_the_kernels[prefixes, padding]",
    ),
    _kernel(
        "bias-gradient-of-one-sample",
        "prompt_attention.py",
        "for i in range(batches * heads):",
        "for i in range(heads):",
        "A bias that all samples share gets the gradient of the first one.",
        f"{_ATTEND_EAGER}[bias]",
    ),
    Fault(
        "shared-prefix-gradient-of-one-sample",
        "mope_fast/ops/_triton.py",
        "grad.copy_(target.sum((1, 2) if grad.shape[1] < target.shape[1] else 2).view(grad.shape))",
        "grad.copy_(target.sum(2)[:, :1].view(grad.shape) if grad.shape[1] < target.shape[1] else target.sum(2).view(grad.shape))",
        "A static prompt is trained by the first sample of each batch only.",
        (f"{_ATTEND}test_gradcheck_in_float64_goes_through_the_kernels[prefixes, padding]",),
        interpreted=True,
    ),
    _fault(
        "second-derivative-is-zero",
        "ops/_registration.py",
        "if not torch.is_grad_enabled() or torch.compiler.is_compiling():",
        "if True:",
        "A gradient penalty silently has no gradient.",
        "tests/ops/test_registration.py::test_every_way_to_a_second_derivative_raises",
    ),
    _fault(
        "sdpa-sees-hidden-keys",
        "ops/sdpa_attention.py",
        "padding = _behind(key_padding_mask, 0 if masked_prefixes else prefix_length, hidden, seen=True, unseen=False)",
        "padding = _behind(key_padding_mask, 0 if masked_prefixes else prefix_length, hidden, seen=True, unseen=True)",
        "On a CPU keys of zeros, there to fill a vector, take part of the attention.",
        f"{_DENSE}[sdpa-padding, 31 keys-torch.float32]",
    ),
    _fault(
        "sdpa-with-bias-sees-hidden-keys",
        "ops/sdpa_attention.py",
        'bias = _behind(bias, prefix_length, hidden, seen=0.0, unseen=float("-inf"))',
        "bias = _behind(bias, prefix_length, hidden, seen=0.0, unseen=0.0)",
        "On a CPU with a bias keys of zeros, there to fill a vector, take part of the attention.",
        f"{_DENSE}[sdpa-bias, 31 keys-torch.float32]",
    ),
    _fault(
        "sdpa-takes-padding-or-causality",
        "ops/sdpa_attention.py",
        "visible = padding if visible is None else visible if padding is None else visible & padding",
        "visible = padding if visible is None else visible",
        "A causal encoder attends to padding.",
        f"{_DENSE}[sdpa-causal, padding-torch.float64]",
    ),
    _fault(
        "overlapping-rows-read-as-they-are",
        "ops/sdpa_attention.py",
        "return last == 1 and (",
        "return False and (",
        "On a CPU attention on a view whose rows share memory, as after unfold, is garbage.",
        "tests/test_attention_backends.py::"
        "test_queries_keys_and_values_may_have_any_strides[sdpa-heads that overlap-head_dim=12-nothing]",
    ),
    _fault(
        "truthy-flags-pass",
        "_checks.py",
        "if not isinstance(value, bool):",
        "if isinstance(value, Tensor):",
        'renormalize="no" renormalises.',
        "tests/test_wrong_settings.py::test_it_is_refused_with_what_was_got",
    ),
    _fault(
        "interval-one-too-short",
        "receptive_field.py",
        "return self._starts[present[0]], self._starts[present[-1]] + self.lengths[present[-1]]",
        "return self._starts[present[0]], self._starts[present[-1]] + self.lengths[present[-1]] - 1",
        "Nobody sees the last position of what a group may see.",
        "tests/properties/test_attention_properties.py::test_lowered_reproduces_the_mask",
    ),
    _fault(
        "sign-bit-of-the-last-group",
        "receptive_field.py",
        "values += [group.index, group.sees - (1 << 32 if group.sees >> 31 else 0)]",
        "values += [group.index, group.sees & 0x7FFFFFFF]",
        "With 32 groups nobody sees the last one.",
        "tests/test_receptive_field.py::test_the_last_of_32_groups_is_the_sign_bit",
    ),
)

# attention in windows of an image
WINDOWS = (
    _fault(
        "cpu-windows-see-what-fills-a-vector",
        "ops/cpu_window_attention.py",
        "self.mask = F.pad(mask, (0, self.keys - mask.shape[-1]), value=-math.inf)",
        "self.mask = F.pad(mask, (0, self.keys - mask.shape[-1]), value=0.0)",
        "On a CPU keys of zeros, there to fill a vector, take part of a Swin's attention.",
        "tests/test_window_prompt_attention.py::test_scale_replaces_the_default",
    ),
    _kernel(
        "seam-of-the-unpadded-image",
        "window_attention.py",
        "below = y >= tl.cdiv(image_size[0], WINDOW[0]) * WINDOW[0] - shift[0]",
        "below = y >= image_size[0] - shift[0]",
        "In a padded Swin tokens of the top and the bottom of the image see each other, and neighbours don't.",
        f"{_WINDOWS}test_any_launch_equals_the_reference[{{'block_q': 16}}]",
    ),
    _kernel(
        "prompt-gradients-keep-tokens-of-other-windows",
        "window_attention.py",
        "grads_k, grads_v = _prompts_only(grads_k, AREA, TILES), _prompts_only(grads_v, AREA, TILES)",
        "grads_k, grads_v = _prompts_only(grads_k, AREA, TILES), grads_v",
        "Values of a window's tokens get the gradients of the windows before it too.",
        f"{_WINDOWS}test_any_launch_equals_the_reference[{{'windows': 3, 'block_q': 16, 'tile': 32}}]",
    ),
    _kernel(
        "padding-rows-are-zero",
        "window_attention.py",
        "return tl.where(padding[:, None], row[None, :], tile)",
        "return tile",
        "At the border of an image whose windows don't fit a Swin differs from timm's.",
        f"{_WINDOWS}test_any_launch_equals_the_reference[{{'block_q': 16}}]",
    ),
    _fault(
        "swin-padding-without-projections-bias",
        "encoders/timm.py",
        "        pad_qkv=padding,\n",
        "        pad_qkv=None,\n",
        "At the border of an image whose windows don't fit a fused Swin differs from timm's.",
        f"{_TIMM}test_fusion_equals_timms_blocks_on_concatenated_prompts[swin: padding-kv]",
    ),
)

# gates, noise, keys, Gram matrices, the importance loss
ROUTER = (
    _fault(
        "one-noise-for-all-layers",
        "modules/router.py",
        "torch.randn_like(logits) * config.noise_std",
        "torch.randn_like(logits[:1]) * config.noise_std",
        "In training all layers' routers are pushed the same way.",
        _OF_ITS_OWN,
    ),
    _fault(
        "one-set-of-keys-for-all-layers",
        "modules/prompts.py",
        "keys = torch.stack([orthogonal_keys(config.num_experts, routing_dim) for _ in self.dims])",
        "keys = torch.stack([orthogonal_keys(config.num_experts, routing_dim)] * layers)",
        "All layers start with the same routing keys, which are never trained.",
        _OF_ITS_OWN,
    ),
    _fault(
        "gate-keeps-ties",
        "reference/route_and_mix.py",
        "return above | (equal & (equal.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))",
        "return above | equal",
        "Among equal logits more than top_k experts stay.",
        _TIES,
    ),
    _fault(
        "renormalize-ignored",
        "reference/route_and_mix.py",
        "return scores / scores.sum(-1, keepdim=True) if renormalize else scores",
        "return scores",
        "With a sparse gate and renormalize=True prompts are smaller than trained for.",
        "tests/modules/test_mope_layer.py::test_gate_keeps_the_largest_of_the_papers_scores",
    ),
    _fault(
        "root-of-a-negative-norm",
        "reference/route_and_mix.py",
        "torch.rsqrt(squared_norm(scores, gram).clamp_min(0.0) + eps)",
        "torch.rsqrt(squared_norm(scores, gram) + eps)",
        "Where experts cancel, rounding makes prompts mixed in K/V space NaN.",
        _CANCEL,
    ),
    _fault(
        "noise-in-eval",
        "modules/router.py",
        "if noisy and config.noise_std > 0:",
        "if config.noise_std > 0:",
        "Predictions of one model on one sample differ from call to call.",
        "tests/modules/test_mope_layer.py::test_noise_is_drawn_in_training_only",
    ),
    _fault(
        "router-in-half-precision",
        "modules/router.py",
        "dtype = torch.promote_types(weight.dtype, torch.float32)",
        "dtype = weight.dtype",
        "A model in bfloat16 routes with three digits, times 1 / temperature.",
        "tests/modules/test_prompt_precision.py::test_a_layer_in_bfloat16_routes_in_float32",
    ),
    _fault(
        "gram-of-the-first-layer",
        "modules/tables.py",
        "self.routers or None, experts, self.gram, shift)",
        "self.routers or None, experts, self.gram if self.gram is None else self.gram[:1].expand_as(self.gram), shift)",
        "Mixed in K/V space, all layers' prompts are normed by the first layer's experts.",
        "tests/models/test_prompt_kinds.py::test_new_kinds_equal_the_concatenation_folded_and_saved[dinov2-kv]",
    ),
    _fault(
        "gram-not-centred",
        "modules/tables.py",
        "gram, eps = expert_gram(wide), known.eps",
        "gram, eps = expert_gram(experts), known.eps",
        "Mixed in K/V space, prompts are divided by the root mean square in place of the deviation.",
        "tests/modules/test_kv_only_form.py::test_scores_are_the_same_in_both_spaces",
        "tests/modules/test_kv_only_form.py::test_keys_and_values_only_equal_concatenation[pre-norm-dense-kv]",
    ),
    _fault(
        "cross-logits-of-another-layer",
        "modules/router.py",
        "query = query.unflatten(-1, (len(self.cross), -1)).transpose(0, 1)",
        "query = query.unflatten(-1, (-1, len(self.cross))).permute(2, 0, 1)",
        "Routers read each other's rows of the projection: saved models route otherwise.",
        "tests/modules/test_prompt_bank.py::test_bank_equals_separate_layers[settings1-dims0]",
    ),
    _fault(
        "biased-variance",
        "reference/importance.py",
        "dim=-1)",
        "dim=-1, correction=0)",
        "The importance loss is smaller by (K - 1) / K, and so is what the threshold meets.",
        "tests/test_importance_loss.py::test_even_use_costs_nothing_and_one_expert_for_all_costs_k",
    ),
    _fault(
        "threshold-of-the-root",
        "reference/importance.py",
        "return torch.where(cv_squared <= threshold, 0.0, cv_squared).mean()",
        "return torch.where(cv_squared <= threshold**2, 0.0, cv_squared).mean()",
        "Layers whose experts are used evenly enough are trained to more evenness.",
        "tests/test_importance_loss.py::test_the_threshold_is_a_tenth_by_default",
    ),
)

# prompts on their way into a layer
PROMPTS = (
    _fault(
        "static-dropout-in-eval",
        "modules/kinds.py",
        "return {width: F.dropout(stack.static_prompt, dropout, training)",
        "return {width: F.dropout(stack.static_prompt, dropout)",
        "Predictions of one model on one sample differ from call to call.",
        "tests/modules/test_mope_layer.py::test_eval_mode_is_deterministic",
    ),
    _fault(
        "recomputed-layer-drops-other-prompts",
        "modules/prompts.py",
        "random = self.training and config.dynamic_dropout > 0",
        "random = False",
        "With gradient checkpointing and dynamic_dropout gradients are those of another forward.",
        f"{_RECOMPUTED}[{{'dynamic_dropout': 0.3}}-bert]",
    ),
    _fault(
        "dynamic-prompts-without-norm",
        "modules/tables.py",
        "routed = routed if layer.norm is None else layer.norm(routed)",
        "routed = routed.clone()",
        "Dynamic prompts of a pre-norm encoder are not what its layer makes of them.",
        "tests/modules/test_kv_only_form.py::test_keys_and_values_only_equal_concatenation[pre-norm-dense-prompt]",
    ),
    _fault(
        "prompt-keys-without-key-norm",
        "modules/tables.py",
        "return (keys if layer.key_norm is None else cast(layer.key_norm(keys), values.dtype)), values",
        "return keys, values",
        "In an encoder with qk-norm prompts have keys of another size than tokens.",
        f"{_TIMM}test_prompt_tuning_equals_timms_blocks_on_concatenated_prompts[vit: norms of queries and keys]",
    ),
    _fault(
        "statistics-of-what-is-not-finite",
        "modules/mapper.py",
        "finite = moved.isfinite().all()",
        "finite = moved.isfinite().any() | True",
        "One infinite feature makes the mapper's batch norm NaN for good, although the step is skipped.",
        "tests/modules/test_prompt_mapper.py::test_a_batch_that_is_not_finite_leaves_no_trace_in_the_statistics_and_shows_in_the_result",
    ),
    _fault(
        "gate-forgets-the-projections-bias",
        "modules/tables.py",
        "if config.top_k is not None and not config.renormalize:",
        "if config.top_k is not None and config.renormalize:",
        "With a sparse gate a post-norm encoder's prompts have a part of the projection's bias only.",
        "tests/modules/test_kv_only_form.py::test_keys_and_values_only_equal_concatenation[post-norm-top2-kv]",
    ),
)

# what is particular to a family of encoders
FAMILIES = (
    _fault(
        "padding-times-zero",
        "encoders/pooling.py",
        "total = torch.where(mask[..., None], x, 0).sum(",
        "total = (x * mask[..., None]).sum(",
        "NaN in padding makes the feature of the whole sample NaN.",
        "tests/encoders/test_encoder_families.py::test_whatever_padding_holds_stays_out_of_the_mean",
    ),
    _fault(
        "keys-and-values-swapped",
        "encoders/transformers.py",
        'keys="attention.k_lin", values="attention.v_lin",',
        'keys="attention.v_lin", values="attention.k_lin",',
        "DistilBERT's prompts are projected by the wrong matrices.",
        f"{_CONCATENATED}[prompt-distilbert]",
    ),
    _fault(
        "traces-keep-no-window",
        "_dispatch.py",
        "if torch.compiler.is_compiling() or torch.jit.is_tracing():",
        "if torch.compiler.is_compiling():",
        "A traced model of a short sequence sees all of a long one.",
        "tests/modules/test_prompt_attention_module.py::test_a_trace_of_few_tokens_keeps_its_window_for_many",
    ),
    _fault(
        "from-attention-drops-the-window",
        "modules/attention.py",
        "(attention.num_kv_heads, attention.window) if ours else (attention.num_heads, None)",
        "(attention.num_kv_heads, None) if ours else (attention.num_heads, None)",
        "The same attention on the same parameters sees all tokens.",
        "tests/modules/test_prompt_attention_module.py::test_from_attention_keeps_what_is_ours",
    ),
    _fault(
        "warm-up-counts-buffers-twice",
        "models/warmup.py",
        "holder.update(own)",
        "pass",
        "What a forward puts in a buffer's place stays behind a warm-up.",
        "tests/models/test_warmup.py::test_a_buffer_that_a_forward_replaces_is_put_back",
    ),
    _fault(
        "padding-mask-dropped",
        "encoders/transformers_attention.py",
        '"key_padding_mask": attention_mask, "bias": bias}',
        '"key_padding_mask": None, "bias": bias}',
        "What padding holds moves the features of a text.",
        f"{_TRANSFORMERS}test_what_padding_holds_changes_nothing[kv-bart]",
    ),
    _fault(
        "bias-by-position-dropped",
        "encoders/transformers_attention.py",
        'bias, prefixes = None, kwargs.get("position_bias"), prefixes_of(module)',
        "bias, prefixes = None, None, prefixes_of(module)",
        "T5 with prompts knows no order of its tokens.",
        f"{_MECHANISMS}[t5: one bias by position for all layers-True]",
    ),
    _fault(
        "checks-of-encoders-see-features-only",
        "models/check_encoder.py",
        "if not error <= tolerance]",
        'if name == "scores" and not error <= tolerance]',
        "A wrong fact of an encoder passes its check.",
        f"{_CHECK}test_a_wrong_norm_is_found",
    ),
    _fault(
        "scale-dropped",
        "encoders/transformers_attention.py",
        "return attend(query, key, value, prefixes, scale=scaling, **masking)",
        "return attend(query, key, value, prefixes, **masking)",
        "Whisper, which scales its queries itself, is scaled twice.",
        f"{_CONCATENATED}[kv-whisper]",
    ),
    _fault(
        "causality-dropped",
        "encoders/transformers_attention.py",
        'is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal',
        "is_causal = bool(is_causal)",
        "An attention that is given no mask sees what comes behind a token, though it is causal.",
        f"{_OTHER_ATTENTION}test_without_a_mask_the_module_says_whether_it_is_causal",
    ),
    _fault(
        "windows-compiled-away",
        "encoders/transformers_attention.py",
        "    return _Mask(attention_mask, _window_of(mask_function))",
        "    return attention_mask if torch.compiler.is_compiling() else _Mask(attention_mask, _window_of(mask_function))",
        "An encoder of sliding windows has them in eager mode only: compiled its tokens see all others.",
        f"{_MECHANISMS}[modernbert: windows, rotation, packed projections-True]",
    ),
    _fault(
        "window-of-transformers-off-by-one",
        "encoders/transformers_attention.py",
        '"sliding_window_overlay": lambda size: (size - 1, None),',
        '"sliding_window_overlay": lambda size: (size, None),',
        "Tokens of a decoder's sliding window see one too many.",
        f"{_MECHANISMS}[qwen3: causal, windows, shared keys, a norm of keys-True]",
    ),
    _fault(
        "joined-windows-are-the-strictest",
        "encoders/transformers_attention.py",
        'return tuple(_strictest(each) if name.startswith("and") else _widest(each) for each in limits)',
        "return tuple(_strictest(each) for each in limits)",
        "A Gemma that looks both ways sees nothing behind a token.",
        f"{_MECHANISMS}[gemma3: both ways, within windows-True]",
    ),
    _fault(
        "other-attention-passes",
        "encoders/transformers_attention.py",
        "if kwargs.get(name) is not None:",
        "if kwargs.get(name, 0) is None:",
        "An encoder that asks for a cap, sinks or a bias gets attention without.",
        f"{_OTHER_ATTENTION}test_what_else_changes_attention_is_refused",
    ),
    _fault(
        "largest-id-as-end-of-text",
        "encoders/transformers.py",
        "return token_at((ids if encoder.config.eos_token_id == 2 else ids == encoder.config.eos_token_id).int().argmax(1))",
        "return token_at(ids.int().argmax(1))",
        "CLIP's router reads some token in place of the end of text.",
        f"{_CONCATENATED}[kv-clip_text]",
    ),
    _fault(
        "last-token-by-count",
        "encoders/pooling.py",
        "return token_at(torch.where(mask.bool(), positions, 0).amax(1))",
        "return token_at(mask.bool().sum(1) - 1)",
        "GPT-2's feature of a text padded on the left is some token in its middle.",
        f"{_TRANSFORMERS}test_left_padded_gpt2_equals_unpadded_with_position_ids",
    ),
    _fault(
        "mean-over-padding",
        "encoders/pooling.py",
        "return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)",
        "return (total / mask.shape[1]).to(x.dtype)",
        "The feature of a sound shrinks with the length of its padding.",
        f"{_TRANSFORMERS}test_padding_to_a_longer_length_changes_nothing[bart]",
    ),
    _fault(
        "one-frame-of-padding",
        "encoders/transformers.py",
        "return torch.arange(frames, device=mask.device) < lengths[:, None]",
        "return torch.arange(frames, device=mask.device) <= lengths[:, None]",
        "A frame of padding is pooled with the sound.",
        f"{_TRANSFORMERS}test_the_frames_counted_as_real_are_the_librarys[hubert]",
    ),
)

# who runs in an encoder, in which mode, and how it is given back
ENCODER = (
    _fault(
        "encoder-trains",
        "encoders/prompted.py",
        "return super().train(False)",
        "return super().train(mode)",
        "model.train() turns the frozen encoder's dropout on.",
        "tests/encoders/test_encoder_families.py::test_prompted_encoder_is_frozen_and_stays_in_eval_mode",
    ),
    _fault(
        "flags-not-given-back",
        "encoders/frozen.py",
        "parameter.requires_grad_(flag)",
        "parameter.requires_grad_(True)",
        "After unwrap() parameters that the user had frozen are trained.",
        "tests/models/test_wrapping.py::test_unwrap_gives_training_mode_and_gradients_back",
    ),
    _fault(
        "turn-not-taken",
        "encoders/attachment.py",
        "with self.lock:\n            if self._eager",
        "if True:\n            if self._eager",
        "A second thread that calls the model gets an error in place of its turn.",
        f"{_THREADS}test_threads_that_share_a_model_each_get_their_own_result",
    ),
    _fault(
        "running-after-an-error",
        "encoders/attachment.py",
        "            state.running = None\n",
        "            pass\n        state.running = None\n",
        "After a Ctrl-C in a forward the model refuses every later one.",
        f"{_THREADS}test_a_forward_within_a_forward_of_the_same_model_is_an_error[encoder]",
    ),
    _fault(
        "prompts-in-another-thread",
        "encoders/attachment.py",
        "running.thread != threading.get_ident()",
        "running.thread == 0",
        "The encoder called on its own takes the prompts of another thread's forward.",
        f"{_THREADS}test_the_encoder_alone_in_another_thread_runs_without_prompts",
    ),
    _fault(
        "layers-without-prompts-pass",
        "encoders/attachment.py",
        "if prompts is not None and len(scores) < len(self.layers):",
        "if not scores:",
        "A layer that was replaced after wrapping runs without prompts, and nobody says so.",
        f"{_THREADS}test_a_layer_that_takes_no_prompts_is_an_error",
    ),
    _fault(
        "owners-held",
        "encoders/attachment.py",
        "self.owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()",
        "self.owners = set()",
        "A model that was dropped locks its encoder for good.",
        f"{_THREADS}test_an_encoder_whose_model_was_dropped_can_be_wrapped_again_and_is_given_back_whole",
    ),
    _fault(
        "owners-copied",
        "encoders/attachment.py",
        'own = ("owners", "lock", "_eager", "_traced", "calls", "traced")',
        'own = ("lock", "_eager", "_traced", "calls", "traced")',
        "A deep copy or a pickle of a wrapped encoder is locked by a model that it doesn't have.",
        f"{_THREADS}test_a_copy_of_a_wrapped_encoder_alone_is_free",
    ),
    _fault(
        "copies-do-not-own",
        "encoders/prompted.py",
        "super().__setstate__(state)\n        self._attachment.owners.add(self)",
        "super().__setstate__(state)",
        "Wrapping the encoder of a copied model once more takes it away from that model.",
        "tests/models/test_wrapping.py::test_a_deep_copy_fuses_like_the_original",
    ),
    _fault(
        "unwrapped-without-an-owner-only",
        "encoders/attachment.py",
        "for attachment in _attachments(encoder):",
        "for attachment in (each for each in _attachments(encoder) if not each.owners):",
        "unwrap_encoder() does nothing where a notebook's variable still holds the model.",
        f"{_THREADS}test_a_notebook_cell_that_runs_twice_has_a_way_on",
    ),
    _fault(
        "classifier-runs",
        "encoders/front.py",
        'return self._own("forward_head", x, pre_logits=True)',
        'return self._own("forward_head", x)',
        "A timm model's feature is its class scores.",
        f"{_FRONT_DOOR}[True-vit]",
    ),
    _fault(
        "past-the-models-call",
        "encoders/timm.py",
        "if not maps and Front.of(encoder) is None and is_plain(encoder)",
        "if not maps and (Front.of(encoder) or is_plain(encoder))",
        "Hooks on a timm model are lost, so are FSDP and offloading.",
        f"{_FRONT_DOOR}[True-vit]",
    ),
    _fault(
        "past-a-plain-models-call",
        "encoders/timm.py",
        "Front.of(encoder) is None and is_plain(encoder) and",
        "Front.of(encoder) is None and",
        "Hooks on a timm model that only gives features are lost.",
        f"{_FRONT_DOOR}[False-vit]",
    ),
    _fault(
        "black-box-trains",
        "models/fusion.py",
        "                source.value.eval()\n",
        "                source.value.train(mode)\n",
        "model.train() turns dropout and batch statistics of a frozen complementary module on.",
        "tests/models/test_fusion.py::test_complementary_module_is_frozen_in_eval_mode_and_without_gradients",
    ),
    _fault(
        "a-map-with-rows-for-columns",
        "encoders/families.py",
        "transpose(1, 2).unflatten(2, (rows, columns))",
        "transpose(1, 2).unflatten(2, (columns, rows)).transpose(2, 3)",
        "A ViT's map is mirrored along its diagonal: masks are put in the wrong place.",
        "tests/encoders/test_tokens_and_maps.py::test_a_map_has_each_patch_in_its_place",
    ),
    _fault(
        "pixels-that-do-not-count",
        "models/dense.py",
        "value.flatten(2) * counted[:, None] for value in (probabilities, truth)",
        "value.flatten(2) for value in (probabilities, truth)",
        "What is predicted where the mask says nothing changes the loss.",
        "tests/models/test_segmentation.py::test_the_loss_is_cross_entropy_and_dice_of_each_sample",
    ),
    _fault(
        "missing-side-counts",
        "models/sides.py",
        "torch.where(present[:, None], feature, stand_in.to(feature.dtype))",
        "feature + 0 * stand_in.to(feature.dtype)",
        "What stands in the place of a missing side is taken for its feature.",
        f"{_SIDES}test_a_missing_side_is_its_stand_in_and_moves_no_other_sample",
    ),
    _fault(
        "stand-in-outside-of-the-graph",
        "models/sides.py",
        "elif self.training and present is None:",
        "elif False:",
        "In DDP the first batch without a missing side ends in an error about unused parameters.",
        f"{_SIDES}test_each_side_has_prompts_of_its_own_and_all_that_is_trained_gets_a_gradient",
    ),
    _fault(
        "side-dropout-in-eval",
        "models/sides.py",
        "if self.training and self.dropout:",
        "if self.dropout:",
        "Predictions lose sides at random.",
        f"{_SIDES}test_side_dropout_takes_optional_sides_away_in_training_only",
    ),
    _fault(
        "padded-frames-count",
        "models/frames.py",
        "features.masked_fill(~mask[..., None], 0).sum(1) / count.clamp(min=1)",
        "features.mean(1)",
        "A video's feature depends on the longest video of its batch.",
        f"{_SIDES}test_frames_are_pooled_over_those_that_are_there[mean]",
    ),
    _fault(
        "sides-in-another-order",
        "models/sides.py",
        "    for side in saved:\n        facts, own",
        "    for side in sorted(saved, key=lambda side: list(given).index(side['name'])):\n        facts, own",
        "A save is put on with its sides in the order in which the user names them: features meet other sides' weights.",
        f"{_SIDES}test_a_save_holds_what_each_side_is",
    ),
    _fault(
        "a-side-folded-is-trained-on",
        "models/sides.py",
        "nn.Parameter(row.detach().clone(), requires_grad=False)",
        "nn.Parameter(row.detach(), requires_grad=False)",
        "A folded model changes while the one that it was made of is trained on.",
        f"{_SIDES}test_folded_frozen_and_checkpointed_it_is_the_same",
    ),
    _fault(
        "rows-of-a-missing-side",
        "data/collator.py",
        "rows = (present.cumsum(0) - 1).clamp(min=0)",
        "rows = torch.arange(len(present)) % int(present.sum())",
        "Samples behind one without a picture get the pictures of others.",
        "tests/data/test_collator.py::test_several_sides_some_of_them_missing",
    ),
)

# folded, stacked, exported and MoPE-BAF's models; analysis
MODELS = (
    _fault(
        "folded-directions-without-the-norms-weight",
        "modules/folded.py",
        "(units * own.weight, zero + own.bias)",
        "(units, zero + own.bias)",
        "Folded for a pre-norm encoder, mapped prompts miss the weight of its norm.",
        "tests/models/test_fold.py::test_folded_equals_unfolded[{}-dinov2]",
    ),
    _fault(
        "folded-state-of-before-over-no-temperature",
        "modules/folded.py",
        "keys / temperature}",
        "keys}",
        "What an earlier version saved of a folded model routes otherwise.",
        "tests/models/test_fold.py::test_a_folded_state_of_an_earlier_version_loads",
    ),
    _fault(
        "kept-tables-outlive-a-change",
        "models/task.py",
        "None:\n        self._drop_tables()\n        super()._load_from_state_dict",
        "None:\n        super()._load_from_state_dict",
        "Within frozen() a model that loaded other weights goes on with the old ones' prompts.",
        "tests/models/test_fold.py::test_frozen_ends_where_weights_may_change[load]",
    ),
    _fault(
        "kept-tables-where-a-gradient-is-asked-for",
        "models/task.py",
        "self._kept is None or torch.is_grad_enabled()",
        "self._kept is None",
        "Within frozen() a backward pass gives prompts no gradient, without a word.",
        "tests/models/test_fold.py::test_frozen_keeps_the_tables_for_the_block_alone",
    ),
    _fault(
        "projected-ahead-of-a-hook",
        "modules/tables.py",
        "if not isinstance(part, nn.Module) or not is_plain(part):",
        "if not isinstance(part, nn.Module):",
        "A projection that is offloaded is called while its weights are elsewhere.",
        "tests/models/test_ownership.py::test_a_projection_with_hooks_is_called_within_its_layer",
    ),
    _fault(
        "packed-projection-kept",
        "ops/sdpa_attention.py",
        "if prefixes and q.requires_grad and _is_part(q):",
        "if False:",
        "A training step of a timm ViT keeps a fifth more memory than it needs.",
        "tests/models/test_launches.py::test_a_vits_training_step_keeps_little_more_than_the_frozen_ones",
    ),
    _fault(
        "statistics-of-an-rms-norm-of-16-bits",
        "modules/norms.py",
        "torch.finfo(torch.promote_types(dtype, torch.float32)).eps",
        "torch.finfo(dtype).eps",
        "In 16 bits prompts behind torch's RMS norm are far too small.",
        "tests/modules/test_kv_only_form.py::test_rms_norms_without_an_eps_take_that_of_what_they_compute_in",
    ),
    _fault(
        "folded-without-gram",
        "modules/folded.py",
        '"gram": tables.gram,',
        '"gram": None,',
        "A folded model's dynamic prompts are not normed.",
        "tests/models/test_fold.py::test_folded_equals_unfolded[{}-dinov2]",
    ),
    _fault(
        "folded-routers-without-bias",
        "modules/folded.py",
        "self.router_shift = nn.Buffer(keys.shift)",
        "self.router_shift = nn.Buffer(0 * keys.shift)",
        "A folded model routes otherwise than the one that was trained.",
        "tests/models/test_fold.py::test_folded_equals_unfolded[{}-bert]",
    ),
    _fault(
        "temperature-of-another-adapter",
        "models/multi_adapter.py",
        "columns.append(bank.cross_logits(cross))",
        "columns.append(bank.cross_logits(cross) * bank.config.temperature / self.banks[0].config.temperature)",
        "Beside an adapter with another temperature a model routes otherwise than alone.",
        "tests/models/test_multi_adapter.py::test_one_pass_equals_running_each_alone[experts and temperatures differ-bert]",
    ),
    _fault(
        "static-prompts-of-another-adapter",
        "models/multi_adapter.py",
        "before=None if kept.before is None else kept.before[ids])",
        "before=None if kept.before is None else kept.before[ids.sort().values])",
        "Samples of a mixed batch get each other's prompts.",
        "tests/models/test_multi_adapter.py::test_one_pass_equals_running_each_alone[prompts of one length-bert]",
    ),
    _fault(
        "exported-output-is-the-first",
        "models/folded.py",
        "return output[self.outputs[0]] if len(self.outputs) == 1 else {name: output[name] for name in self.outputs}",
        "return output[0] if len(self.outputs) == 1 else {name: output[name] for name in self.outputs}",
        "A program exported for its scores gives logits.",
        "tests/models/test_export.py::test_outputs_are_chosen_by_name",
    ),
    _fault(
        "fusion-in-one-direction",
        "modules/block_fusion.py",
        "self._exchange(self.to_image, own_image, image, text),",
        "self._exchange(self.to_text, own_image, image, text),",
        "MoPE-BAF's image prompt goes through the weights of the text prompt.",
        "tests/modules/test_block_fusion.py::test_every_form_equals_its_equation",
    ),
    _fault(
        "modalities-prompts-swapped",
        "models/mope_baf/plan.py",
        '"text": {"text_prompt": True, "text": True, "image": each_other, "image_prompt": others},',
        '"text": {"text_prompt": others, "text": True, "image": each_other, "image_prompt": True},',
        "MoPE-BAF's text sees the image's prompt in place of its own.",
        "tests/models/mope_baf/test_baf_visibility.py::test_every_cell_of_every_layer",
    ),
    _fault(
        "text-padding-hides-prompts",
        "models/vlmo/model.py",
        "return F.pad(attention_mask.bool(), (before, after), value=True)",
        "return F.pad(attention_mask.bool(), (before, after), value=False)",
        "With an attention mask nobody sees prompts and image.",
        "tests/models/test_vlmo.py::test_biases_and_masks_leave_room_for_prompts",
    ),
    _fault(
        "relative-positions-transposed",
        "models/vlmo/positions.py",
        "offset = (row[:, None] - row + grid - 1) * (2 * grid - 1) + column[:, None] - column + grid - 1",
        "offset = (row - row[:, None] + grid - 1) * (2 * grid - 1) + column - column[:, None] + grid - 1",
        "Official VLMo weights are read with queries and keys exchanged.",
        "tests/models/test_vlmo_oracle.py::test_every_pass",
    ),
    _fault(
        "dead-by-the-share-of-all",
        "analysis/alarms.py",
        "share < thresholds.dead / num_experts)",
        "share < thresholds.dead)",
        "With many experts healthy ones are reported as dead.",
        "tests/analysis/test_measures.py::test_alarms_say_what_is_wrong_in_which_layer",
    ),
)

# what a loss is of
LOSSES = (
    _fault(
        "trainers-smoothing-drops-the-importance-loss",
        "models/fusion.py",
        "return super()._loss_is_cross_entropy() and not self._has_auxiliary_loss()",
        "return super()._loss_is_cross_entropy()",
        "With label_smoothing_factor transformers' Trainer trains on the task loss alone.",
        "tests/models/test_trainers.py::"
        "test_a_trainers_own_label_smoothing_is_refused_where_it_would_drop_a_part_of_the_loss"
        "[single_label_classification-evaluate]",
    ),
    _fault(
        "labels-count-from-one",
        "models/task.py",
        "(values < classes)",
        "(values <= classes)",
        "A class that isn't there reads past the end of the logits.",
        "tests/models/test_labels.py::test_labels_that_are_none_of_a_problems_are_refused",
    ),
    _fault(
        "fractions-out-of-range",
        "models/task.py",
        "return torch.where((labels >= 0) & (labels <= 1), labels, torch.nan)",
        "return labels",
        "On a GPU a multi-label loss rewards what is wrong without bound where a label is -100.",
        "tests/models/test_labels.py::test_what_can_not_be_looked_at_makes_the_loss_nan",
    ),
)

# several processes
# several processes
RANKS = (
    _fault(
        "joint-batch-of-all-ranks",
        "_distributed.py",
        "dist.group.WORLD if self.name is None else dist.distributed_c10d._resolve_process_group(self.name)",
        "dist.group.WORLD",
        "use_joint_batch(group) takes the losses of ranks that aren't in the group too.",
        f"{_JOINT}test_two_processes_train_as_one[quick]",
    ),
    _fault(
        "left-out-labels-counted",
        "models/task.py",
        "!= NOT_A_LABEL).sum()",
        ">= NOT_A_LABEL).sum()",
        "With use_joint_batch samples of class -100, which have no loss, make that of the others smaller.",
        f"{_JOINT}test_losses_of_a_joint_batch_have_float32_at_least_and_leave_out_what_has_no_label",
    ),
    _fault(
        "gradient-of-one-rank",
        "_distributed.py",
        "(part - part.detach()) * group.size()",
        "(part - part.detach())",
        "With DDP the importance loss weighs less the more GPUs there are.",
        "tests/test_importance_loss.py::test_ranks_together_give_the_loss_and_ddps_gradients_of_the_whole_batch",
    ),
    _fault(
        "shard-saved-for-the-whole",
        "_distributed.py",
        "return value.full_tensor() if is_sharded(value) else value",
        "return value.to_local() if is_sharded(value) else value",
        "A model sharded by FSDP saves the first rank's part of its prompts.",
        "tests/models/test_distributed_checkpoint.py::test_two_processes_save_and_load",
    ),
)

# saves, features on disk, and the keys they are found by
FILES = (
    _fault(
        "files-not-durable",
        "_files.py",
        "os.fsync(file.fileno())",
        "file.flush()",
        "After a power cut a file has its name and no content.",
        "tests/test_files.py::test_a_file_is_on_disk_before_it_has_its_name_and_its_name_afterwards",
    ),
    _fault(
        "weights-not-checked",
        "models/checkpoint.py",
        "hashlib.sha256(data)",
        "hashlib.sha256(data[:64])",
        "A save with a flipped bit is loaded.",
        "tests/models/test_checkpoint.py::test_damaged_weights_are_refused[flip_last_byte]",
    ),
    _fault(
        "temperature-not-compared",
        "models/checkpoint.py",
        '"noise_std", "dropout", "dynamic_dropout",',
        '"temperature", "noise_std", "dropout", "dynamic_dropout",',
        "A save is read into a model of another temperature, which then routes otherwise.",
        "tests/models/test_checkpoint.py::test_a_save_that_does_not_fit_changes_nothing",
    ),
    _fault(
        "old-weights-dropped-first",
        "models/checkpoint.py",
        "weights, data)\n",
        'weights, data) or [old.unlink() for old in folder.glob("*.safetensors") if old.name != Path(weights).name]\n',
        "A kill while saving leaves a description whose weights are gone.",
        "tests/models/test_checkpoint.py::test_a_kill_while_saving_leaves_the_old_save",
    ),
    _fault(
        "waiting-weights-dropped",
        "models/checkpoint.py",
        "if not _waiting(weights).exists() and",
        "if",
        "Of two processes that save at once one deletes the weights that the other is about to name.",
        f"{_SAVES}test_a_save_between_any_two_steps_of_another_never_loses_weights[False-others2]",
    ),
    _fault(
        "named-weights-dropped",
        "models/checkpoint.py",
        "not _waiting(weights).exists() and _named_weights(folder) not in (None, weights.name)",
        "_named_weights(folder) not in (None, weights.name) and not _waiting(weights).exists()",
        "Of two processes that save at once one deletes the weights that the other has just named.",
        f"{_SAVES}test_a_save_published_while_another_one_drops_what_it_replaced_keeps_its_weights",
    ),
    _fault(
        "nan-saved",
        "models/checkpoint.py",
        "if problems := not_finite(state):",
        "if problems := not_finite({}):",
        "A training that has diverged overwrites its last good save.",
        f"{_SAVES}test_a_save_refuses_numbers_that_are_not_finite_by_name_and_keeps_the_old_one",
    ),
    _fault(
        "other-weights-taken",
        "models/checkpoint.py",
        "        if found:\n",
        "        if found and strict:\n",
        "Prompts are put on an encoder that they were not trained on, and nobody says so.",
        "tests/models/test_other_weights.py::test_other_weights_of_the_same_shapes_are_a_warning_and_refused_by_strict",
    ),
    _fault(
        "other-weights-by-the-saves-name",
        "models/checkpoint.py",
        "if strict or name in refused:",
        "if strict:",
        "A predictor whose encoder was trained on, and is another one on the hub, predicts with that one.",
        "tests/test_predictor.py::test_an_encoder_with_other_weights_under_its_name_is_refused",
    ),
    _fault(
        "file-written-in-place",
        "_files.py",
        "            os.replace(temporary, path)\n        else:",
        "            path.write_bytes(temporary.read_bytes())\n            temporary.unlink()\n        else:",
        "A kill while saving leaves half of a file under its final name.",
        "tests/models/test_checkpoint.py::test_a_kill_while_saving_leaves_the_old_save",
    ),
    _fault(
        "rows-not-checked",
        "data/feature_store.py",
        "if _check_of(key, rows[index * size : (index + 1) * size]) != checks[index]:",
        "if not checks[index]:",
        "A feature with a flipped bit is trained on.",
        "tests/data/test_feature_cache.py::test_a_damaged_row_is_found_when_it_is_read",
    ),
    _fault(
        "cut-by-length",
        "data/fingerprint.py",
        "cut = bool(lengths) and name in padded and",
        "cut = bool(lengths) and",
        "A table whose rows are as many as a text has tokens gets the feature of another table.",
        f"{_CACHE}test_what_only_looks_like_padding_is_content",
    ),
    _fault(
        "store-of-another-format-read",
        "data/feature_store.py",
        'PREFIX, SUFFIX = f"features.{FORMAT}-", ".safetensors"',
        'PREFIX, SUFFIX = "features-", ".safetensors"',
        "A store of the first format is taken for one of this one.",
        f"{_CACHE}test_rows_of_another_format_are_computed_again_and_its_processes_go_on",
    ),
    _fault(
        "features-of-another-encoder",
        "data/feature_store.py",
        'if meta["fingerprint"] != self.fingerprint:',
        'if meta["encoder"] != self.encoder:',
        "After the encoder was trained on its old features are taken from disk.",
        "tests/data/test_feature_cache.py::test_the_cache_of_another_encoder_is_refused",
    ),
    _fault(
        "key-without-dtype",
        "data/fingerprint.py",
        "str(tensor.dtype), kept",
        "kept",
        "Inputs of other types with the same bytes get each other's features.",
        "tests/data/test_feature_cache.py::test_another_content_is_another_sample",
    ),
)

# readers, pictures, splits, metrics
DATA = (
    _fault(
        "dev-among-train",
        "data/few_shot.py",
        "dev = torch.cat([of[-shots:] for of in shuffled])",
        "dev = torch.cat([of[-shots - 1 : -1] for of in shuffled])",
        "Where a class has just enough samples, one is in train and in dev.",
        "tests/data/test_few_shot.py::test_balanced_disjoint_and_complete",
    ),
    _fault(
        "label-by-hashtag",
        "data/readers.py",
        "labels[-1]",
        "labels[0]",
        "Sarcasm is tested against labels that no annotator has seen.",
        "tests/data/test_readers.py::test_twitter_valid_and_test_take_the_annotators_label",
    ),
    _fault(
        "contradictions-kept",
        "data/readers.py",
        "return image if text == neutral else None",
        "return image if text == neutral else text",
        "Posts whose text and image contradict each other are in the set: figures can't be compared with published ones.",
        "tests/data/test_readers.py::test_mvsa_combines_sentiments",
    ),
    _fault(
        "micro-for-macro",
        "data/metrics.py",
        'f1("macro", range(num_classes))',
        'f1("micro", range(num_classes))',
        "The reported macro F1 is the accuracy.",
        "tests/data/test_few_shot.py::test_metrics_by_hand",
    ),
    _fault(
        "parents-lead-out",
        "data/folder.py",
        "return any(real.is_relative_to(folder) for folder in self._allowed)",
        "return any(path.is_relative_to(folder) for folder in self._allowed)",
        "A data set's ../../secret.png is shown in its report.",
        f"{_JSONL}test_an_image_outside_of_the_folder_is_refused[parent]",
    ),
    _fault(
        "links-lead-out",
        "data/folder.py",
        "if listing.files[name]:",
        "if False:",
        "A link in a data set that leads to any file is shown in its report.",
        f"{_JSONL}test_an_image_outside_of_the_folder_is_refused[link to a file]",
    ),
    _fault(
        "names-by-bytes",
        "data/folder.py",
        'return unicodedata.normalize("NFC", name)',
        "return name",
        "Images with accents in their names are missing in a set that was unzipped on a Mac.",
        f"{_JSONL}test_accents_of_file_names_in_either_form[NFC-NFD]",
    ),
    _fault(
        "grey-clipped",
        "data/images.py",
        "((pixels * 255 + highest // 2) // highest)",
        "pixels.clip(max=255)",
        "Pictures in grey of 16 bits are white.",
        f"{_PICTURES}test_grey_of_16_bits_in_memory_is_scaled",
    ),
    _fault(
        "transparent-is-black",
        "data/images.py",
        'Image.new("RGBA", pixels.size, "white")',
        'Image.new("RGBA", pixels.size, "black")',
        "Black text on a transparent ground can't be seen.",
        f"{_PICTURES}test_transparency_of_every_mode_in_memory",
    ),
    _fault(
        "orientation-ignored",
        "data/images.py",
        "TURNS.get(_orientation(image))",
        "TURNS.get(None)",
        "Photographs of telephones lie on their side.",
        f"{_PICTURES}test_a_picture_is_turned_as_its_exif_data_says[6]",
    ),
    _fault(
        "cut-pictures-pass",
        "data/images.py",
        "ImageFile.LOAD_TRUNCATED_IMAGES = False",
        "pass",
        "Where somebody has set Pillow's switch, half of a picture is trained on as grey.",
        f"{_PICTURES}test_files_cut_short_are_refused_whatever_pillows_switch_says[jpg-True]",
    ),
    _fault(
        "one-class-twice",
        "data/jsonl.py",
        "if repeated := sorted(name for name, count in Counter(names).items() if count > 1):",
        "if repeated := sorted(name for name, count in Counter(names).items() if count > 2):",
        "Two classes have one name, and the first has no samples.",
        "tests/data/test_jsonl.py::test_labels_file",
    ),
    _fault(
        "television-kept",
        "data/published/mm_imdb.py",
        "if not _LEFT_OUT.isdisjoint(genres):",
        "if _LEFT_OUT >= set(genres):",
        "Movies of News and a genre of a class stay in MM-IMDB: figures can't be compared with published ones.",
        f"{_PUBLISHED}test_television_other_genres_and_empty_plots_are_left_out",
    ),
    _fault(
        "friends-in-train",
        "data/published/mustard.py",
        'show != "FRIENDS"',
        'show != "BBT"',
        "The split by speakers has the test's speakers in train.",
        f"{_PUBLISHED}test_both_splits_of_mustard_are_334_and_356[speaker-independent]",
    ),
    _fault(
        "posters-in-caffes-colors",
        "data/images.py",
        "[:, None, None])[::-1]",
        "[:, None, None])",
        "Posters of MM-IMDB's HDF5 have red for blue.",
        f"{_PUBLISHED}test_posters_and_words_of_the_authors_hdf5[True]",
    ),
    _fault(
        "pickles-called",
        "data/plain_pickle.py",
        'raise pickle.UnpicklingError(f"it names {module}.{name}, but only lists, dicts, strings, numbers and arrays are read")',
        "return super().find_class(module, name)",
        "A data set's pickled file runs whatever it says.",
        f"{_PUBLISHED}test_nothing_that_metadata_names_is_called",
    ),
    _fault(
        "listed-links-lead-out",
        "data/published/food101.py",
        "if (image := reading.files.find(path)) is not None:",
        "if (image := path) is not None:",
        "A link among the pictures of Food-101 that leads to any file is shown in its report.",
        f"{_PUBLISHED}test_a_link_that_leads_out_of_the_set_is_refused[food101]",
    ),
    _fault(
        "left-out-uncounted",
        "data/published/sets.py",
        "sum(len(posts) + sum(map(len, posts.dropped.values()))",
        "sum(len(posts)",
        "A whole set whose reader leaves samples out, as the authors do, is said to lack them.",
        f"{_PUBLISHED}test_differences_of_counts_are_named",
    ),
    _fault(
        "val-by-chance",
        "data/published/common.py",
        "stratify=labels",
        "stratify=None",
        "A class of Food-101 may be missing in val.",
        f"{_PUBLISHED}test_food_val_is_held_out_of_each_class_and_the_same_by_the_same_seed",
    ),
    _fault(
        "sound-of-any-rate",
        "data/audio.py",
        "if found == rate:",
        "if found:",
        "Sound of 44.1 kHz is heard as if it were slowed down.",
        "tests/data/test_audio.py::test_sound_is_mono_float32_at_16_khz",
    ),
    Fault(
        "augmentation-by-epochs-since-the-start",
        "examples/jsonl_task.py",
        "torch.manual_seed((self.seed * 1_000_003 + self.epoch) * len(self.posts) + int(index))",
        "torch.seed()",
        "A resumed run sees other images than an undisturbed one.",
        ("tests/examples/test_train_recipe.py::test_augmentation_depends_on_seed_epoch_and_sample_only",),
    ),
    _fault(
        "half-a-folder",
        "data/writer.py",
        "part = Path(made) / folder.name",
        "part = folder",
        "A conversion that was stopped leaves a folder that looks whole.",
        "tests/data/test_writer.py::test_nothing_is_left_of_a_folder_that_could_not_be_written",
    ),
)

FAULTS = (*ROUTE_AND_MIX, *ATTENTION, *WINDOWS, *ROUTER, *PROMPTS, *FAMILIES, *ENCODER, *MODELS, *LOSSES, *RANKS, *FILES, *DATA)
