"""Exported models as they are deployed: by the recipes of docs/export.md, in a process that knows nothing of mope_fast."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import export, namespaces, onnx_model
from tiny_fusion import CLASSES, make_bert, make_dinov2, make_fusion, make_images, make_text
from torch import nn

from mope_fast import FusionOutput, PromptTuned

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
EXPORT, LOAD, PACKAGE, LOAD_PACKAGE, _ = re.findall(r"```py(?:thon)?\n(.*?)```", PAGE, re.DOTALL)
CHECK = """
import sys, torch

for inputs, expected in torch.load("cases.pt"):
    torch.testing.assert_close(run(*inputs), expected, rtol=1e-5, atol=1e-5)
print(*{name.partition(".")[0] for name in sys.modules} & {"mope_fast", "transformers", "timm"})
"""


def close(got, expected):
    """float32 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def make_small(complementary="dinov2", **settings):
    """float32, one layer a side."""
    side = make_dinov2(num_hidden_layers=1) if complementary == "dinov2" else complementary
    return make_fusion(make_bert(num_hidden_layers=1), side, **settings).float()


def page(tmp_path, monkeypatch):
    """The page's first snippet, run; and what its model gives at other sizes, with padding, in a file."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXPORT, names)
    cases = []
    for batch, tokens in ((4, 9), (1, 30), (3, 2)):
        text = {**make_text(batch, tokens), "input_ids": torch.randint(1000, 2000, (batch, tokens))}
        inputs = (text, torch.randn(batch, 512))
        cases.append((inputs, names["deployed"](*inputs)))
    torch.save(cases, "cases.pt")
    return names


def in_a_process_of_its_own(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_saved_program_runs_where_only_torch_is_imported(tmp_path, monkeypatch):
    page(tmp_path, monkeypatch)
    assert in_a_process_of_its_own(LOAD + CHECK) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="Inductor needs a C++ compiler")
def test_an_inductor_package_runs_where_only_torch_is_imported(tmp_path, monkeypatch):
    names = page(tmp_path, monkeypatch)
    exec(PACKAGE, names)
    assert in_a_process_of_its_own(LOAD_PACKAGE + CHECK) == []


def test_a_program_of_the_model_itself_gives_its_output_where_mope_fast_is_imported(tmp_path):
    folded = make_small().fold()
    path, inputs = tmp_path / "model.pt2", (make_text(4), make_images(4).float())
    torch.export.save(export(folded, *inputs), path)
    got, expected = torch.export.load(path).module()(*inputs), folded(*inputs)
    assert isinstance(got, FusionOutput)
    close(got.to_tuple(), expected.to_tuple())


class BlackBox(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 20)

    def forward(self, images):
        return self.linear(images.mean((2, 3)))


@pytest.mark.parametrize(
    ("complementary", "settings"),
    [
        ("dinov2", {}), (BlackBox, {"cross_dim": 20}), ("dinov2", {"complementary_prompt_length": 0, "use_dynamic": False}),
    ],
    ids=str,
)  # fmt: skip
def test_both_sides_at_other_sizes(complementary, settings):
    side = complementary if complementary == "dinov2" else complementary()
    model = make_small(side, **settings).fold().for_export()
    program = export(model, make_text(4), make_images(4).float())
    assert namespaces(program) == {"aten"}
    for batch, tokens in ((1, 5), (7, 20)):
        inputs = make_text(batch, tokens), make_images(batch).float()
        close(program.module()(*inputs), model(*inputs))


def test_a_gate_in_onnx(tmp_path):
    fusion = make_small(None, cross_dim=20, top_k=2, renormalize=True)
    model = fusion.fold().for_export("logits", "scores")
    program = export(model, make_text(4), torch.randn(4, 20))
    in_onnx = onnx_model(program, ["input_ids", "attention_mask", "features"], ["logits", "scores"], tmp_path / "model.onnx")
    text, features = make_text(6), torch.randn(6, 20)
    expected = model(text, features)
    assert (expected["scores"] > 0).sum(-1).eq(2).all()
    close(program.module()(text, features), expected)
    close(dict(zip(["logits", "scores"], in_onnx({**text, "features": features}), strict=True)), expected)


def test_prompt_tuned():
    model = PromptTuned(make_dinov2(num_hidden_layers=1), 4, 3).float().fold().for_export()
    images = make_images(5).float()
    close(export(model, images[:2]).module()(images), model(images))


def test_bfloat16():
    model = make_small(None, cross_dim=20).bfloat16().fold().for_export()
    exported = export(model, make_text(4), torch.randn(4, 20, dtype=torch.bfloat16)).module()
    inputs = make_text(3), torch.randn(3, 20, dtype=torch.bfloat16)
    assert exported(*inputs).dtype == torch.bfloat16
    torch.testing.assert_close(exported(*inputs), model(*inputs))


def test_a_model_that_is_not_folded_exports_with_its_labels():
    model = make_small(None, cross_dim=20, mixing="kv")
    labels = torch.randint(CLASSES, (4,))
    exported = export(model, make_text(4), torch.randn(4, 20), labels).module()
    inputs = make_text(7), torch.randn(7, 20), torch.randint(CLASSES, (7,))
    close(exported(*inputs).to_tuple(), model(*inputs).to_tuple())


def test_key_norms_export_unfolded_at_other_batch_sizes():
    """They rule out mixing in K/V space: rows of all samples are projected together."""
    model = make_small(None, cross_dim=20, mixing="prompt")
    exported = export(model, make_text(4), torch.randn(4, 20)).module()
    inputs = make_text(7), torch.randn(7, 20)
    close(exported(*inputs).logits, model(*inputs).logits)


def test_exporting_leaves_the_model_as_it_was_even_where_it_fails():
    model = make_small()
    folded, inputs = model.fold(), (make_text(4), make_images(4).float())
    before = folded(*inputs).logits
    with pytest.raises(ValueError, match="the two sides differ in batch size"):
        export(folded, make_text(4), make_images(3).float())
    export(folded, *inputs)
    assert torch.equal(folded(*inputs).logits, before)
    text = inputs[0]
    plain = model.main(text).feature
    bert, _ = model.unwrap()
    close(bert.eval()(**text).last_hidden_state[:, 0], plain)


def test_labels_have_no_place_in_a_folded_model():
    folded = make_small().fold()
    for model in (folded, folded.for_export()):
        with pytest.raises(TypeError, match=r"too many positional arguments|takes .* positional arguments"):
            torch.export.export(model, (make_text(4), make_images(4).float(), torch.zeros(4, dtype=torch.long)))


def test_outputs_are_chosen_by_name():
    folded = make_small().fold()
    inputs = make_text(3), make_images(3).float()
    output = folded(*inputs)
    assert torch.equal(folded.for_export()(*inputs), output.logits)
    assert torch.equal(folded.for_export("scores")(*inputs), output.scores)
    both = folded.for_export("features", "logits")(*inputs)
    assert list(both) == ["features", "logits"]
    assert torch.equal(both["features"], output.features)
    headless = make_small(num_classes=None, use_dynamic=False).fold()
    assert torch.equal(headless.for_export()(*inputs), headless(*inputs).features)
    with pytest.raises(ValueError, match=r"for_export got \['logits', 'scores', 'loss'\], .* it has \['features', 'tokens'\]"):
        headless.for_export("logits", "features", "scores", "loss")
    with pytest.raises(ValueError, match=r"for_export got \['feature_maps'\]"):
        folded.for_export("feature_maps")
