"""Every family folded and exported, at other sizes than it was exported with: in torch and in ONNX Runtime."""

import pytest
import tiny_timm
import torch
from exported import SEQUENCES, export, namespaces, onnx_model
from tiers import slow_but
from tiny_transformers import CASES, FORWARDS, make_cross, make_fusion

from mope_fast import _implementations

IN_ONNX = {"bert", "gpt2", "clip_text", "bart", "dinov2", "siglip_vision", "whisper", "wav2vec2", "timm_vit", "timm_swin"}
"""Those whose graphs differ in kind."""
SMALL = {"vit": {"depth": 1}, "swin": {"depths": (2,), "num_heads": (2,)}}


def single(inputs):
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def make_family(name):
    """A float32 encoder, one layer of it where one will do, and (batch) -> its keyword arguments."""
    if name in CASES:
        return CASES[name].make(1).float(), lambda batch: single(CASES[name].inputs(batch))
    kind = name.removeprefix("timm_")
    encoder = tiny_timm.make_encoder(kind, **SMALL[kind])
    return encoder.float(), lambda batch: single({"x": tiny_timm.make_images(batch, kind, {})})


def shorter(inputs):
    """Where there is a length; what says where a text ends stays in it."""
    return {name: value[:, 2:].contiguous() for name, value in inputs.items()} if SEQUENCES & set(inputs) else inputs


def close(got, expected):
    """float32 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but([("bert",)], [(name,) for name in (*FORWARDS, "timm_vit", "timm_swin")]))
def test_every_family_at_other_sizes(name, tmp_path):
    encoder, make_inputs = make_family(name)
    model = make_fusion(encoder, 3).fold().for_export()
    inputs = make_inputs(4)
    program = export(model, inputs, make_cross(4).float())
    assert namespaces(program) == {"aten"}
    runs = [program.module()]
    if name in IN_ONNX:
        session = onnx_model(program, [*inputs, "features"], ["logits"], tmp_path / "model.onnx")
        runs.append(lambda inputs, features: session({**inputs, "features": features})[0])
    for batch in (5, 1):
        inputs, features = shorter(make_inputs(batch)), make_cross(batch).float()
        for run in runs:
            close(run(inputs, features), model(inputs, features))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_text_without_a_mask(name):
    encoder, make_inputs = make_family(name)
    model = make_fusion(encoder, 3).fold().for_export()
    exported = export(model, {"input_ids": make_inputs(4)["input_ids"]}, make_cross(4).float()).module()
    inputs, features = shorter({"input_ids": make_inputs(1)["input_ids"]}), make_cross(1).float()
    close(exported(inputs, features), model(inputs, features))


@pytest.mark.parametrize("name", slow_but([("bert",)], [("bert",), ("timm_vit",)]))
def test_strict(name):
    encoder, make_inputs = make_family(name)
    model = make_fusion(encoder, 3).fold().for_export()
    exported = export(model, make_inputs(4), make_cross(4).float(), strict=True).module()
    inputs, features = shorter(make_inputs(1)), make_cross(1).float()
    close(exported(inputs, features), model(inputs, features))


def test_feature_maps():
    encoder, make_inputs = make_family("timm_swin")
    model = make_fusion(encoder, 3).fold().for_export("logits", "feature_maps")
    exported = export(model, make_inputs(4), make_cross(4).float()).module()
    inputs, features = make_inputs(3), make_cross(3).float()
    close(exported(inputs, features), model(inputs, features))


def test_a_chosen_implementation_stays_in_the_program(monkeypatch):
    encoder, make_inputs = make_family("timm_swin")
    model = make_fusion(encoder, 3).fold().for_export()
    inputs = make_inputs(4), make_cross(4).float()
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "cpu")
    program = export(model, *inputs)
    assert namespaces(program) == {"aten", "mope_fast"}
    close(program.module()(*inputs), model(*inputs))
