import copy
import subprocess
import sys

import pytest
import torch
from op_recorder import Recorder
from tiny_timm import (
    CLASSES,
    CROSS,
    FEATURE,
    SWINS,
    VARIANTS,
    close,
    gradients,
    layers,
    make_cross,
    make_encoder,
    make_fusion,
    make_images,
    swin_maps,
    swin_transformer,
    timm,
    trained,
    vision_transformer,
    vit_feature,
)
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, MultiAdapter, PromptAttention, PromptedEncoder, PromptTuned
from mope_fast.encoders import encode, find_family

KINDS = ["vit", "swin"]
FEW = {
    "vit: vit": ("vit", {}),
    "vit: deit distilled": ("vit", {"distilled": True}),
    "swin: windows that fit": ("swin", {}),
    "swin: padding": ("swin", SWINS["padding"]),
}
DETERMINISTIC = {"dropout": 0.0, "noise_std": 0.0}
variants = pytest.mark.parametrize(("kind", "settings"), VARIANTS.values(), ids=VARIANTS)
few = pytest.mark.parametrize(("kind", "settings"), FEW.values(), ids=FEW)
kinds = pytest.mark.parametrize("kind", KINDS)


def make_plain(encoder):
    """A copy for the oracle, outside of all wrapping."""
    return copy.deepcopy(encoder).requires_grad_(False).eval()


@pytest.mark.parametrize("mixing", ["prompt", "kv"])
@variants
def test_fusion_equals_timms_blocks_on_concatenated_prompts(kind, settings, mixing):
    encoder = make_encoder(kind, **settings)
    plain, model = make_plain(encoder), make_fusion(encoder, mixing=mixing)
    images, cross = make_images(5, kind, settings), make_cross(5)
    if mixing == "kv" and settings.get("qk_norm"):
        with pytest.raises(ValueError, match="mixing='kv' is not exact here: the layer"):
            model(images, cross)
        return

    context, scores = model.bank.prepare(cross), []

    def routed(i, pooled):
        out = model.bank.layer(i, pooled, context)
        scores.append(out.scores)
        return out.prompts

    expected = FEATURE[kind](plain, images, routed), torch.stack(scores)
    output = model(images, cross)
    assert output.features.shape == (5, model.main.feature_width)
    close((output.features, output.scores), expected)
    got, truth = gradients(model, output.features, output.scores), gradients(model, *expected)
    for name in truth:
        assert truth[name].abs().max() > 1e-8, name
        close(got[name], truth[name])


@variants
def test_prompt_tuning_equals_timms_blocks_on_concatenated_prompts(kind, settings):
    encoder = make_encoder(kind, **settings)
    plain, model = make_plain(encoder), PromptTuned(encoder, 5, prompt_init=0.5).double().eval()
    images, widths = make_images(3, kind, settings), model.main.widths

    def static(i, pooled):
        rows = model.bank.stacks[str(widths[i])].static_prompt[i - widths.index(widths[i])]
        return rows.expand(3, -1, -1)

    expected, features = FEATURE[kind](plain, images, static), model(images).features
    close(features, expected)
    close(gradients(model, features), gradients(model, expected))
    assert not torch.allclose(features, encode(plain, images), atol=1e-3)


@variants
def test_without_prompts_the_feature_is_what_timms_classifier_gets(kind, settings):
    encoder = make_encoder(kind, **settings).eval()
    images = make_images(3, kind, settings)
    logits, features = encoder(images), encode(encoder, images)
    close(PromptTuned(encoder, 0)(images).features, features)
    if settings.get("distilled"):
        tokens = encoder.forward_features(images)
        close((encoder.head(tokens[:, 0]) + encoder.head_dist(tokens[:, 1])) / 2, logits)
        close((tokens[:, 0] + tokens[:, 1]) / 2, features)
    else:
        close(encoder.get_classifier()(features), logits)


def test_static_and_mapped_prompts_fold_in_front_of_a_key_norm():
    model = make_fusion(make_encoder("vit", qk_norm=True), use_dynamic=False)
    images, cross = make_images(6, "vit", {}), make_cross(6)
    close(model.fold()(images, cross).features, model(images, cross).features)


@few
def test_folding_and_checkpointing_change_no_result(kind, settings):
    model = make_fusion(make_encoder(kind, **settings))
    images, cross = make_images(6, kind, settings), make_cross(6)
    output = model(images, cross)
    before = gradients(model, output.features, output.scores)
    folded = model.fold()(images, cross)
    close((folded.features, folded.scores), (output.features, output.scores))
    model.gradient_checkpointing_enable()
    output = model(images, cross)
    for name, gradient in gradients(model, output.features, output.scores).items():
        close(gradient, before[name])


@pytest.mark.parametrize("settings", [SWINS["windows that fit"], SWINS["padding"]], ids=["fits", "padding"])
def test_feature_maps_are_those_of_timms_stages_with_prompts(settings):
    encoder = make_encoder("swin", **settings)
    plain, model = make_plain(encoder), make_fusion(encoder)
    images, cross = make_images(3, "swin", settings), make_cross(3)
    context = model.bank.prepare(cross)
    expected = swin_maps(plain, images, lambda i, pooled: model.bank.layer(i, pooled, context).prompts)
    output = model(images, cross, feature_maps=True)
    assert len(output.feature_maps) == len(encoder.layers)
    for got, stage in zip(output.feature_maps, expected, strict=True):
        close(got, stage.permute(0, 3, 1, 2))
    close(output.features, model(images, cross).features)
    close(gradients(model, *output.feature_maps), gradients(model, *(stage.permute(0, 3, 1, 2) for stage in expected)))
    for maps in (model.fold()(images, cross, feature_maps=True).feature_maps, model(images, cross, feature_maps=True).feature_maps):
        close(list(maps), list(output.feature_maps))
    assert model(images, cross).feature_maps is None


def test_feature_maps_of_prompt_tuning_and_of_no_prompts():
    encoder = make_encoder("swin").eval()
    images = make_images(2, "swin", {})
    close(list(PromptTuned(encoder, 0)(images, feature_maps=True).feature_maps), encoder.forward_intermediates(images)[1])
    tuned = PromptTuned(make_encoder("swin"), 3).double().eval()
    maps = tuned(images, feature_maps=True).feature_maps
    assert [tuple(m.shape[1:]) for m in maps] == [tuple(m.shape[1:]) for m in encoder.forward_intermediates(images)[1]]
    assert all(g.norm() > 0 for g in gradients(tuned, *maps).values())


class RowsOnly(nn.Linear):
    """Takes rows, not a single vector, as quantised projections do."""

    def forward(self, x):
        assert x.dim() > 1
        return super().forward(x)


def test_a_hook_that_comes_later_is_not_passed_by_in_silence():
    encoder = make_encoder("swin")
    model, images, cross = make_fusion(encoder), make_images(2, "swin", {}), make_cross(2)
    handle = encoder.layers[0].blocks[1].attn.register_forward_hook(lambda module, args, out: 0 * out)
    with pytest.raises(RuntimeError, match="can't take prompts any more: one of its attentions has hooks"):
        model(images, cross)
    handle.remove()
    model(images, cross)


def test_parameters_that_took_others_place_are_given_back_as_those_were():
    encoder = make_encoder("swin")
    encoder.patch_embed.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in encoder.named_parameters()}
    model = make_fusion(encoder)
    encoder.set_input_size((48, 48), window_size=6)
    model.unwrap()
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == flags


def test_padding_asks_a_projection_of_any_kind():
    encoder = make_encoder("swin", **SWINS["padding"])
    model, other = make_fusion(copy.deepcopy(encoder)), make_fusion(encoder)
    other.load_state_dict(model.trained_state_dict(), strict=False)
    for stage in encoder.layers:
        for block in stage.blocks:
            block.attn.qkv.__class__ = RowsOnly
    images, cross = make_images(2, "swin", SWINS["padding"]), make_cross(2)
    close(other(images, cross).features, model(images, cross).features)


def test_a_model_made_for_feature_maps_only_is_told_of_ours():
    model = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, embed_dim=8, num_heads=(1, 1, 1, 1))
    with pytest.raises(TypeError, match=r"not supported: it is a model created with features_only=True; .* feature_maps=True"):
        make_fusion(model)


def test_swin_v2_is_refused_with_the_reason():
    model = timm.models.SwinTransformerV2(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,))
    with pytest.raises(TypeError, match=r"timm's SwinTransformerV2 is not supported: .*cosine.*timm's SwinTransformer"):
        make_fusion(model)


def test_shifts_and_padding_are_all_among_the_cases():
    seen = set()

    def look(block, args):
        padding = [-size % window for size, window in zip(args[0].shape[1:3], block.window_size, strict=True)]
        seen.add((any(block.shift_size), any(padding)))

    for settings in SWINS.values():
        encoder = make_encoder("swin", **settings)
        for stage in encoder.layers:
            for block in stage.blocks:
                block.register_forward_pre_hook(look)
        encoder(make_images(1, "swin", settings))
    assert seen == {(shift, padding) for shift in (False, True) for padding in (False, True)}


@pytest.mark.parametrize("mixing", ["auto", "prompt"])
@few
def test_a_sample_sees_its_own_prompts_only(kind, settings, mixing):
    model = make_fusion(make_encoder(kind, **settings), mixing=mixing)
    images, cross = make_images(8, kind, settings), make_cross(8)
    together = model(images, cross).features
    # eight samples mix in K/V space, one in prompt space
    close(torch.cat([model(images[i : i + 1], cross[i : i + 1]).features for i in range(8)]), together)
    for changed in (0, 5):
        other = cross.clone()
        other[changed] += 1
        difference = (model(images, other).features - together).abs().amax(-1)
        assert difference[changed] > 1e-3
        difference[changed] = 0
        assert difference.max() < 1e-12


def state(encoder):
    """Everything that wrapping could leave behind."""
    return {
        "modules": {name: id(module) for name, module in encoder.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in encoder.named_modules()},
        "training": {name: module.training for name, module in encoder.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in encoder.named_parameters()},
        "state dict": list(encoder.state_dict()),
    }


@variants
def test_wrapped_encoder_gives_what_it_gave_and_unwrap_gives_it_back(kind, settings):
    encoder = make_encoder(kind, **settings)
    next(encoder.parameters()).requires_grad_(False)
    images, before = make_images(4, kind, settings), state(encoder)
    logits = encoder.eval()(images)
    encoder.train()
    model = make_fusion(encoder)
    assert not any(module.training for module in encoder.modules())
    assert list(encoder.state_dict()) == before["state dict"]
    for _ in range(2):
        close(encoder(images), logits, 1e-12)
        model(images, make_cross(4))
    assert model.unwrap()[0] is encoder
    assert state(encoder) == before
    assert torch.equal(encoder.eval()(images), logits)


@kinds
def test_an_encoder_takes_prompts_from_one_model_at_a_time(kind):
    encoder = make_encoder(kind)
    images, cross = make_images(3, kind, {}), make_cross(3)
    first = make_fusion(encoder)
    before = first(images, cross).features
    for wrap in (make_fusion, PromptedEncoder, lambda encoder: PromptTuned(encoder, 2)):
        with pytest.raises(ValueError, match=f"this {type(encoder).__name__} already takes prompts from another model"):
            wrap(encoder)
    assert torch.equal(first(images, cross).features, before)
    second = make_fusion(first.unwrap()[0])
    second.load_state_dict(first.trained_state_dict(), strict=False)
    assert torch.equal(second(images, cross).features, before)


@few
def test_a_deep_copy_is_a_model_of_its_own(kind, settings):
    model = make_fusion(make_encoder(kind, **settings))
    images, cross = make_images(5, kind, settings), make_cross(5)
    before = model(images, cross).features
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images, cross).features, before)
    with torch.no_grad():
        for parameter in twin.main.encoder.parameters():
            parameter.mul_(1.5)
    changed = twin(images, cross).features
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(model(images, cross).features, before)
    # of its norms, projections and attention there is one of each in the copy too
    fresh = make_fusion(twin.unwrap()[0])
    fresh.load_state_dict(twin.trained_state_dict(), strict=False)
    assert torch.equal(fresh(images, cross).features, changed)
    assert torch.equal(model(images, cross).features, before)


def test_pickled_models_work_in_another_process(tmp_path):
    saved = []
    for kind, settings in FEW.values():
        model = make_fusion(make_encoder(kind, **settings))
        inputs = make_images(3, kind, settings), make_cross(3)
        saved.append((model, inputs, model(*inputs).features))
    torch.save(saved, tmp_path / "models.pt")
    script = """
import sys, torch
for model, inputs, features in torch.load(sys.argv[1], weights_only=False):
    torch.testing.assert_close(model(*inputs).features, features, rtol=1e-12, atol=1e-12)
    model.unwrap()[0](inputs[0])
"""
    process = subprocess.run([sys.executable, "-c", script, tmp_path / "models.pt"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@kinds
def test_weights_loaded_after_wrapping_count_everywhere(kind):
    encoder, other = make_encoder(kind), make_encoder(kind)
    images, cross = make_images(5, kind, {}), make_cross(5)
    model = make_fusion(encoder, mixing="kv")
    model.main.encoder.load_state_dict(other.state_dict(), assign=True)
    fresh = make_fusion(other, mixing="kv")
    fresh.load_state_dict(model.trained_state_dict(), strict=False)
    assert torch.equal(model(images, cross).features, fresh(images, cross).features)


@kinds
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "mixing": "prompt", "dynamic_dropout": 0.1}], ids=["default", "more"])
def test_a_training_step_never_waits_for_the_host(kind, settings):
    model = make_fusion(make_encoder(kind), num_classes=CLASSES, **settings).train()
    images, cross, labels = make_images(6, kind, {}), make_cross(6), torch.randint(CLASSES, (6,))
    with Recorder() as recorder:
        model(images, cross, labels).loss.backward()
    assert not recorder.waits()
    assert len(recorder.names) > 200


@pytest.mark.slow  # transformers' families do so quickly
@pytest.mark.parametrize(
    ("kind", "settings", "mode"),
    [
        ("vit", {"depth": 1}, "fusion"),
        ("swin", {"depths": (2,), "num_heads": (2,), "image": (30, 30)}, "fusion"),
        ("swin", {"depths": (2,), "num_heads": (2,)}, "prompts only"),
    ],
)
def test_compiled_step_equals_eager_for_every_batch_size_without_recompiling(kind, settings, mode):
    torch._dynamo.reset()
    encoder = make_encoder(kind, **settings)
    if mode == "fusion":
        model = make_fusion(encoder, num_classes=CLASSES, **DETERMINISTIC).train()
    else:
        model = PromptTuned(encoder, 3, CLASSES, dropout=0.0).double().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = trained(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (6, 9):
            inputs = [make_images(size, kind, settings), make_cross(size), torch.randint(CLASSES, (size,))]
            if mode != "fusion":
                del inputs[1]
            results = []
            for step in (model, compiled):
                output = step(*inputs)
                results.append((output.logits, output.loss, *torch.autograd.grad(output.loss, list(parameters.values()))))
            for name, expected, got in zip(["logits", "loss", *parameters], *results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixing", ["prompt", "kv"])
@few
def test_autocast_stays_near_float32(kind, settings, mixing, dtype):
    model = make_fusion(make_encoder(kind, **settings), mixing=mixing).float()
    images, cross = make_images(6, kind, settings).float(), make_cross(6).float()
    exact = model(images, cross)
    with torch.autocast("cpu", dtype):
        output = model(images, cross)
    assert near(output.features, exact.features) < 0.03
    assert near(output.scores, exact.scores) < 0.03
    got, truth = gradients(model, output.features.float()), gradients(model, exact.features)
    assert max(near(got[name], truth[name]) for name in truth) < 0.15


def near(got, expected):
    """Relative distance; NaN if anything is."""
    return ((got.float() - expected).norm() / expected.norm()).item()


@few
def test_a_half_precision_encoder_takes_float32_prompts(kind, settings):
    encoder = make_encoder(kind, **settings).float()
    images, cross = make_images(6, kind, settings).float(), make_cross(6).float()
    exact = make_fusion(copy.deepcopy(encoder)).float()
    model = MoPEFusion(encoder.bfloat16(), None, config=exact.config).eval()
    model.load_state_dict(exact.trained_state_dict(), strict=False)
    features = model(images.bfloat16(), cross).features
    assert features.dtype == torch.bfloat16
    assert near(features, exact(images, cross).features) < 0.05
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model, features).values())


@few
def test_models_with_prompts_of_different_lengths_share_one_encoder(kind, settings):
    shared = PromptedEncoder(make_encoder(kind, **settings))
    models = {
        "fusion": make_fusion(shared, num_classes=CLASSES),
        "longer": make_fusion(shared, num_classes=CLASSES, prompt_length=5),
        "prompts": PromptTuned(shared, 2, CLASSES).double().eval(),
    }
    images, cross = make_images(6, kind, settings), make_cross(6)
    names = ["fusion", "prompts", "longer", "prompts", "longer", "fusion"]
    together = MultiAdapter(models)(images, names, {"fusion": cross, "longer": cross}).logits
    for name, model in models.items():
        own = torch.tensor([name == n for n in names])
        alone = model(images) if name == "prompts" else model(images, cross)
        close(together[own], alone.logits[own])


def test_a_mask_of_tokens_hides_no_prompt():
    encoder = make_encoder("vit")
    plain, model = make_plain(encoder), make_fusion(encoder)
    images, cross = make_images(3, "vit", {}), make_cross(3)
    mask = torch.rand(3, 1, 1, 17) < 0.6
    mask[..., 0] = True
    context = model.bank.prepare(cross)
    x = plain._pos_embed(plain.patch_embed(images))
    for i, block in enumerate(plain.blocks):
        prompts = model.bank.layer(i, x[:, 0], context).prompts
        visible = torch.cat([mask.new_ones(3, 1, 1, prompts.shape[1]), mask], dim=-1)
        x = block(torch.cat([prompts, x], dim=1), attn_mask=visible)[:, prompts.shape[1] :]
    close(model({"x": images, "attn_mask": mask}, cross).features, plain.norm(x)[:, 0])


def test_attention_of_ours_in_timms_model_takes_prompts_and_stays():
    encoder = make_encoder("vit", attn_layer=PromptAttention)
    twin = make_encoder("vit")
    twin.load_state_dict(encoder.state_dict())
    images, cross, own = make_images(3, "vit", {}), make_cross(3), [block.attn for block in encoder.blocks]
    model, other = make_fusion(encoder), make_fusion(twin)
    other.load_state_dict(model.trained_state_dict(), strict=False)
    close(model(images, cross).features, other(images, cross).features)
    assert [block.attn for block in model.unwrap()[0].blocks] == own
    assert all("forward" not in vars(attention) for attention in own)


def test_from_attention_can_ignore_dropout():
    theirs = layers.Attention(32, 4, attn_drop=0.3, proj_drop=0.2).double().eval()
    with pytest.raises(ValueError, match=r"no dropout, Attention\.attn_drop\.p is 0\.3"):
        PromptAttention.from_attention(theirs)
    ours = PromptAttention.from_attention(theirs, ignore_dropout=True)
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    close(ours(x), theirs(x), 1e-12)
    assert torch.equal(ours.train()(x), ours.eval()(x))


class OwnBlock(vision_transformer.Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask, is_causal)


class OwnWindowAttention(swin_transformer.WindowAttention):
    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


def with_hook():
    encoder = make_encoder("vit")
    encoder.blocks[1].attn.register_forward_hook(lambda module, args, out: 2 * out)
    return encoder


def with_hook_on_windows():
    encoder = make_encoder("swin")
    encoder.layers[0].blocks[1].attn.register_forward_hook(lambda module, args, out: 2 * out)
    return encoder


def with_own_shift():
    encoder = make_encoder("swin")
    encoder.layers[0].blocks[1]._attn = lambda x: x
    return encoder


class ShiftingBlock(swin_transformer.SwinTransformerBlock):
    def _attn(self, x):
        return 2 * super()._attn(x)


def with_own_shifting_block():
    encoder = make_encoder("swin")
    encoder.layers[0].blocks[1].__class__ = ShiftingBlock
    return encoder


def without_a_block():
    encoder = make_encoder("swin")
    encoder.layers[0].blocks[1] = nn.Identity()
    return encoder


def with_own_window_attention():
    encoder = make_encoder("swin")
    encoder.layers[1].blocks[0].attn.__class__ = OwnWindowAttention
    return encoder


def with_timms_checkpointing(kind):
    encoder = make_encoder(kind)
    encoder.set_grad_checkpointing()
    return encoder


def without_head():
    encoder = make_encoder("swin")
    encoder.head = nn.Identity()
    return encoder


def pruned(kind):
    encoder = make_encoder(kind)
    encoder.prune_intermediate_layers([0])
    return encoder


BLOCKS = ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock", "DiffParallelScalingBlock"]
UNPOOLED = r"it doesn't pool its tokens \(global_pool=''\): create it with global_pool='avg', or call reset_classifier"
CHECKPOINTING = r"timm's gradient checkpointing is on: call set_grad_checkpointing\(False\) on it, and use the fused model's own"
REFUSED = {
    **{
        name: (lambda name=name: make_encoder("vit", block_fn=getattr(vision_transformer, name)), f"its blocks are {name}s")
        for name in BLOCKS
    },
    "own block": (lambda: make_encoder("vit", block_fn=OwnBlock), "its blocks are OwnBlocks; timm's plain Block is supported"),
    "differential": (
        lambda: make_encoder("vit", attn_layer="diff"),
        "plain Attention is supported, but that of its block 0 is not: DiffAttention has .*sub_norm",
    ),
    "rotary": (lambda: make_encoder("vit", attn_layer=layers.AttentionRope), "AttentionRope.forward takes rope, which"),
    "hooked": (with_hook, "that of its block 1 is not: Attention has hooks"),
    "hooked windows": (with_hook_on_windows, "one of its attentions has hooks, or a forward set on"),
    "own shift": (with_own_shift, "one of its attentions has hooks, or a forward set on"),
    "no block": (without_a_block, "it has a Identity in place of timm's SwinTransformerBlock"),
    "own shifting block": (with_own_shifting_block, "a ShiftingBlock in place of timm's SwinTransformerBlock"),
    "own window attention": (with_own_window_attention, "a OwnWindowAttention in place of timm's WindowAttention"),
    "vit without pooling": (lambda: make_encoder("vit", global_pool=""), UNPOOLED),
    "swin without pooling": (lambda: make_encoder("swin", global_pool=""), UNPOOLED),
    "pruned vit": (lambda: pruned("vit"), UNPOOLED),
    "pruned swin": (lambda: pruned("swin"), UNPOOLED),
    "swin without its head": (without_head, r"its head, which pools, was replaced by Identity: .* reset_classifier\(0\)"),
    "checkpointed vit": (lambda: with_timms_checkpointing("vit"), CHECKPOINTING),
    "checkpointed swin": (lambda: with_timms_checkpointing("swin"), CHECKPOINTING),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_take_prompts_says_why_and_stays_as_it_was(make, message):
    encoder = make()
    before = state(encoder)
    for wrap in (make_fusion, lambda encoder: PromptTuned(encoder, 2)):
        with pytest.raises(TypeError, match=f"timm's {type(encoder).__name__} can't take prompts: .*{message}"):
            wrap(encoder)
    assert state(encoder) == before


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4}
UNLISTED = {
    "Cait": lambda: timm.models.cait.Cait(**SMALL),
    "NaFlexVit": lambda: timm.models.naflexvit.NaFlexVit(timm.models.naflexvit.NaFlexVitCfg(embed_dim=32, depth=1, num_heads=4)),
}


@pytest.mark.parametrize("name", UNLISTED)
def test_unlisted_models_are_told_what_is_supported(name):
    with pytest.raises(
        TypeError, match=f"timm's {name} is not a supported encoder: .*Expected one of .*VisionTransformer, SwinTransformer"
    ):
        make_fusion(UNLISTED[name]())


@kinds
def test_timms_checkpointing_turned_on_later_is_noticed(kind):
    model = make_fusion(make_encoder(kind))
    model.main.encoder.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match=CHECKPOINTING):
        model(make_images(2, kind, {}), make_cross(2))


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("vit_tiny_patch16_224", {}, 224),
        ("deit_tiny_distilled_patch16_224", {}, 224),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 56),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4}, 32),
        ("swin_tiny_patch4_window7_224", {}, 224),
        ("swin_s3_tiny_224", {}, 224),
    ],
)
def test_models_by_timms_names_run(name, settings, size):
    encoder = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    model = MoPEFusion(encoder, None, CLASSES, MoPEConfig(cross_dim=CROSS)).eval()
    assert find_family(encoder).name == ("timm_swin" if "swin" in name else "timm_vit")
    with torch.inference_mode():
        output = model(torch.randn(2, 3, size, size), torch.randn(2, CROSS))
    assert output.logits.shape == (2, CLASSES)
    assert output.features.isfinite().all()
    assert output.scores.shape == (len(model.main.widths), 2, 16)


class LoraLinear(nn.Linear):
    """A projection that is more than its weight."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + 0.1 * x.mean(-1, keepdim=True)


def test_a_projection_that_is_more_than_a_linear_layer_is_called():
    encoder = make_encoder("vit")
    qkv = encoder.blocks[0].attn.qkv
    lora = LoraLinear(qkv.in_features, qkv.out_features, bias=qkv.bias is not None).double()
    lora.load_state_dict(qkv.state_dict())
    encoder.blocks[0].attn.qkv = lora
    plain = copy.deepcopy(encoder).eval()
    model = make_fusion(encoder)
    images, cross = make_images(5, "vit", {}), make_cross(5)
    context = model.bank.prepare(cross)
    expected = vit_feature(plain, images, lambda i, x: model.bank.layer(i, x, context).prompts)
    lora.calls = 0
    close(model(images, cross).features, expected)
    assert lora.calls == 2  # the tokens, and the prompts


def test_only_keys_and_values_of_a_linear_projection_are_computed():
    encoder = make_encoder("vit")
    layer = find_family(encoder).layers(encoder)[0]
    rows, qkv = torch.randn(3, encoder.embed_dim, dtype=torch.float64), encoder.blocks[0].attn.qkv
    close(layer.k_proj(rows), qkv(rows)[:, qkv.out_features // 3 :])
    seen = []
    qkv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.k_proj(rows)
    assert len(seen) == 1


def test_the_batch_is_that_of_the_images_whatever_comes_first():
    encoder = make_encoder("vit")
    model = make_fusion(encoder)
    images, cross = make_images(3, "vit", {}), make_cross(3)
    tokens = encoder.pos_embed.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    close(model({"attn_mask": mask, "x": images}, cross).features, model(images, cross).features)
