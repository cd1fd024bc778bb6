"""Two processes that hold half of every weight (FSDP2) train as one that holds all."""

import copy
import gc
import weakref

import pytest
import timm
import torch
from tiny_baf import CLASSES as BAF_CLASSES
from tiny_baf import SMALL, make_baf, make_inputs, make_vlmo
from tiny_fusion import (
    CLASSES,
    DETERMINISTIC,
    INPUTS,
    close,
    make_bert,
    make_dinov2,
    make_fusion,
    make_images,
    make_text,
    trained,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from two_processes import UNEVEN, cut, gradients, part, run_in_two_processes

from mope_fast import PromptTuned

EXACT = {**DETERMINISTIC, "mapper_norm": "layer", "importance_weight": 0.5}
BATCH = sum(UNEVEN)


def frozen_layers(model):
    sides = [model.main, *([model.complementary.main] if isinstance(getattr(model, "complementary", None), PromptTuned) else [])]
    return [layer.module for side in sides for layer in side.layers]


def shard(model, **settings):
    for layer in frozen_layers(model):
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def shard_with_a_unit_for_the_bank(model):
    fully_shard(model.bank, reshard_after_forward=False)
    register_fsdp_forward_method(model.bank, "prepare")
    return shard(model)


def shard_with_a_unit_for_the_encoder(model):
    fully_shard(model.main.encoder)
    return fully_shard(model)


def shard_baf(model):
    for block in model.backbone.transformer.blocks:
        fully_shard(block)
    if model.config.freeze_backbone:
        fully_shard(model.backbone)
    return fully_shard(model)


def run(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def check_trains_as_one(rank, model, batch, shard_it=shard, steps=2):
    """Losses and gradients, and parameters behind each step of AdamW."""
    model.train()
    alone = copy.deepcopy(model)
    model.use_joint_batch()
    shard_it(model)
    models = model, alone
    optimizers = [torch.optim.AdamW(trained(m).values(), 1e-2) for m in models]
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs = run(model, cut(batch, part(rank))), run(alone, batch)
        for output in outputs:
            output.loss.backward()
        close(outputs[0].loss, outputs[1].loss)
        assert gradients(model).keys() == gradients(alone).keys()
        close(gradients(model), gradients(alone))
        for optimizer in optimizers:
            optimizer.step()
        close(model.trained_state_dict(), alone.trained_state_dict(), 1e-6)  # AdamW divides by what may be next to nothing


def fusion_and_batch(main="bert", other="dinov2", **settings):
    model = make_fusion(main, other, **{**EXACT, **settings})
    return model, (INPUTS[main](BATCH), INPUTS[other](BATCH), torch.arange(BATCH) % CLASSES)


def check_both_kinds_of_mixing_with_and_without_checkpointing(rank, folder):
    for index, mixing in enumerate(("kv", "prompt")):
        for main, other in (("bert", "dinov2"), ("dinov2", "bert")):
            model, batch = fusion_and_batch(main, other, mixing=mixing)
            if (main == "bert") == bool(index):
                model.gradient_checkpointing_enable()
            check_trains_as_one(rank, model, batch)


def check_other_ways_to_shard(rank, folder):
    ways = [shard_with_a_unit_for_the_bank, shard_with_a_unit_for_the_encoder, fully_shard]
    ways += [lambda model, keep=keep: shard(model, reshard_after_forward=keep) for keep in (True, False)]
    for way in ways:
        check_trains_as_one(rank, *fusion_and_batch("dinov2", "bert"), way)


def check_timm(rank, folder):
    vit = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
    swin = {"model_name": "swin_tiny_patch4_window7_224", "img_size": 32, "window_size": 4, "embed_dim": 16}
    swin |= {"depths": (1, 2), "num_heads": (2, 4)}
    batch = torch.randn(BATCH, 3, 32, 32).double(), torch.randn(BATCH, 6).double(), torch.arange(BATCH) % CLASSES
    for encoder in (vit, swin):
        for mixing in ("kv", "prompt"):
            model = make_fusion(timm.create_model(**encoder, num_classes=0), None, cross_dim=6, mixing=mixing, **EXACT)
            check_trains_as_one(rank, model, batch, shard_with_a_unit_for_the_encoder if mixing == "kv" else shard)


def check_one_encoder(rank, folder):
    model = PromptTuned(make_dinov2(), 2, CLASSES, dropout=0.0).double()
    check_trains_as_one(rank, model, (make_images(BATCH), torch.arange(BATCH) % CLASSES))


def check_mope_baf(rank, folder):
    sizes = {**SMALL, "num_layers": 3, "first_fusion_layer": 2}
    inputs = {**make_inputs(BATCH, image_size=SMALL["image_size"]), "labels": torch.arange(BATCH) % BAF_CLASSES}
    for frozen in (False, True):
        model = make_baf(make_vlmo(drop_path_rate=0.0, **sizes), freeze_backbone=frozen)
        if frozen:
            model.gradient_checkpointing_enable()
        check_trains_as_one(rank, model, inputs, shard_baf)


def check_compiled_layers(rank, folder):
    model = make_fusion(make_bert(num_hidden_layers=1), None, cross_dim=6, **EXACT)
    for layer in frozen_layers(model):
        layer.compile(backend="aot_eager")
    batch = make_text(BATCH), torch.randn(BATCH, 6).double(), torch.arange(BATCH) % CLASSES
    torch._dynamo.utils.counters.clear()
    check_trains_as_one(rank, model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def check_mixed_precision(rank, folder):
    model, batch = fusion_and_batch("dinov2", "bert")
    model, batch = model.float().train(), (batch[0].float(), *batch[1:])
    alone = copy.deepcopy(model)
    expected = alone(*batch)
    expected.loss.backward()
    model.use_joint_batch()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    dtypes = []
    frozen_layers(model)[0].register_forward_hook(lambda layer, args, output: dtypes.append(output.dtype))
    output = model(*cut(batch, part(rank)))
    output.loss.backward()
    assert dtypes == [torch.bfloat16]
    assert (output.loss.dtype, output.scores.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.02, atol=0.0)
    for name, grad in gradients(model).items():
        truth = gradients(alone)[name]
        assert grad.dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), truth.flatten(), dim=0) > 0.95, name


def check_whole_weights_are_freed_and_the_encoder_is_given_back(rank, folder):
    encoder = make_bert().train()
    encoder.pooler.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in encoder.named_parameters()}
    model = make_fusion(encoder, "dinov2", **EXACT)
    before = [weakref.ref(p) for p in model.parameters()]
    with torch.no_grad():
        expected = model(make_text(2), make_images(2)).logits
    shard(model)
    gc.collect()
    assert not any(parameter() is not None for parameter in before)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        torch.manual_seed(0)
        assert model(make_text(2), make_images(2)).logits.shape == expected.shape
    model.unwrap()
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == flags


def check_evaluation(rank, folder):
    model, batch = fusion_and_batch("dinov2", "bert")
    expected = model(*batch)
    shard(model)
    with pytest.raises(RuntimeError, match=r"fold\(\) needs whole weights, but this MoPEFusion is sharded: save it"):
        model.fold()
    with torch.no_grad():
        output = model(*cut(batch, part(rank)))
    close(output.logits, expected.logits[part(rank)])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    checks = [check for name, check in globals().items() if name.startswith("check_") and name != "check_trains_as_one"]
    run_in_two_processes(checks, tmp_path)
