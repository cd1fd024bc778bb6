"""What prompts add to a frozen layer: launches, the registered ops counted as one each, and memory. Neither must grow unnoticed."""

import pytest
import torch
import torch.nn.functional as F
from op_recorder import Recorder
from timm.models.vision_transformer import VisionTransformer
from tiny_fusion import make_bert, make_dinov2, make_images, make_text

from mope_fast import MoPEConfig, MoPEFusion, _dispatch
from mope_fast.encoders import family_of
from mope_fast.ops.layer_prompts import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="ops are counted, not what they do")

BATCH, CROSS, CLASSES = 24, 20, 5
NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "new_empty_strided", "permute", "promote_types",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "_unsafe_view", "view",
}  # fmt: skip


def make_vit(num_hidden_layers):
    return VisionTransformer(img_size=12, patch_size=4, embed_dim=48, depth=num_hidden_layers, num_heads=3, num_classes=0).double()


ENCODERS = {
    "ViT": (make_vit, make_images),
    "BERT": (make_bert, lambda batch: make_text(batch)["input_ids"]),  # a mask is the library's to prepare
    "DINOv2": (make_dinov2, make_images),
}


def launches(step):
    with Recorder() as recorder:
        step()
    return sum(name not in NO_LAUNCH for name in recorder.names)


def counts(name, layers):
    """Of the frozen encoder and the fused model: forward, folded forward, forward and backward."""
    make, inputs = ENCODERS[name]
    frozen, x = make(num_hidden_layers=layers).requires_grad_(False).eval(), inputs(BATCH)
    family = family_of(frozen)
    x = family.keyword_arguments(x)
    first = family.layers(frozen)[0].module
    model = MoPEFusion(make(num_hidden_layers=layers), None, CLASSES, MoPEConfig(cross_dim=CROSS)).double()
    features, labels = torch.randn(BATCH, CROSS, dtype=torch.float64), torch.arange(BATCH) % CLASSES
    weight = torch.randn(model.main.feature_width, CLASSES, dtype=torch.float64)

    def encode():
        return F.cross_entropy(family.encode(frozen, x) @ weight, labels)

    with torch.no_grad():
        folded = model.eval().fold()
        inference = [launches(step) for step in (encode, lambda: model(x, features), lambda: folded(x, features))]
    # as prompts have it: a gradient by the first layer's input
    start = torch.zeros((), dtype=torch.float64, requires_grad=True)
    hook = first.register_forward_pre_hook(lambda module, args: (args[0] + start, *args[1:]))
    training = [launches(lambda: encode().backward()), launches(lambda: model.train()(x, features, labels).loss.backward())]
    hook.remove()
    return torch.tensor([inference[1] - inference[0], inference[2] - inference[0], training[1] - training[0]])


@pytest.mark.parametrize(("name", "most"), [("ViT", (2, 1, 8)), ("BERT", (3, 1, 11)), ("DINOv2", (3, 1, 11))])
def test_launches_of_a_layers_prompts(name, most, monkeypatch):
    monkeypatch.setattr(_dispatch, "choose", lambda function, impl, problem: "triton")
    extra = counts(name, 3) - counts(name, 2)
    assert (extra <= torch.tensor(most)).all(), f"unfolded, folded, training: {extra.tolist()}, at most {most} before"


def bytes_kept(step):
    """Of storages that a forward keeps for its backward, those of parameters left out."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def test_a_vits_training_step_keeps_little_more_than_the_frozen_ones():
    def make():
        return VisionTransformer(img_size=56, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=0)

    frozen, images, features = make().requires_grad_(False).eval(), torch.randn(2, 3, 56, 56), torch.randn(2, CROSS)
    model = MoPEFusion(make(), None, CLASSES, MoPEConfig(cross_dim=CROSS)).train()
    start = torch.zeros((), requires_grad=True)
    frozen.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + start,))
    # the packed projection is let go where keys and values are copies beside prompts
    assert bytes_kept(lambda: model(images, features)) < 1.1 * bytes_kept(lambda: frozen(images))
