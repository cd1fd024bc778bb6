"""A folded model equals the one it comes from."""

import copy

import pytest
import torch
from tiny_fusion import INPUTS, MAKE, close, make_bert, make_dinov2, make_fusion, make_images, make_text
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned

OTHER = {"bert": "dinov2", "dinov2": "bert"}


def trained(model):
    """Batch norm statistics and everything else away from their start."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("main", ["bert", "dinov2"])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"top_k": 2}, {"top_k": 2, "renormalize": True}, {"learn_keys": True, "mapper_norm": "layer"},
        {"use_dynamic": False}, {"use_mapped": False}, {"use_static": False}, {"use_dynamic": False, "use_mapped": False},
        {"complementary_prompt_length": 0}, {"num_experts": 1}, {"mixing": "prompt"},
    ],
    ids=str,
)  # fmt: skip
def test_folded_equals_unfolded(main, settings):
    model = trained(make_fusion(main, OTHER[main], **settings))
    inputs = INPUTS[main](6), INPUTS[OTHER[main]](6)
    expected, got = model(*inputs), model.fold()(*inputs)
    close(got.logits, expected.logits)
    close(got.features, expected.features)
    assert (got.scores is None) is (expected.scores is None)
    if expected.scores is not None:
        close(got.scores, expected.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_is_as_near_to_the_truth_as_unfolded(dtype):
    truth_model = trained(make_fusion("dinov2", "bert", complementary_prompt_length=0))
    low = copy.deepcopy(truth_model).to(dtype)
    images, text = make_images(16), make_text(16)
    truth = copy.deepcopy(low).double()(images.to(dtype).double(), text).features
    errors = [(m(images.to(dtype), text).features.double() - truth).square().mean().sqrt() for m in (low, low.fold())]
    assert errors[1] <= 2 * errors[0]


def test_prompt_tuned_folds_too():
    model = trained(PromptTuned(make_dinov2(), 5, 3).double())
    images = make_images(4)
    close(model.fold()(images).logits, model(images).logits)


def test_folding_leaves_the_model_alone_and_does_not_follow_it():
    model = trained(make_fusion())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = make_text(6), make_images(6)
    before = model(*inputs).logits
    folded = model.fold()
    assert torch.equal(model(*inputs).logits, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert not torch.allclose(model(*inputs).logits, before)
    close(folded(*inputs).logits, before)


def test_a_folded_model_is_for_inference():
    folded = make_fusion().fold().train()
    assert not any(module.training for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert not folded(make_text(3), make_images(3)).logits.requires_grad


def test_a_folded_model_in_training_of_its_source_has_no_dropout():
    model = make_fusion().train()
    inputs = make_text(6), make_images(6)
    folded = model.fold()
    assert torch.equal(folded(*inputs).logits, folded(*inputs).logits)
    close(folded(*inputs).logits, model.eval()(*inputs).logits)


def test_a_folded_model_does_less_for_each_layer():
    """It calls no projection of the frozen layers for prompts: each is called once, for the tokens."""
    model = make_fusion("bert", None, cross_dim=20)
    calls = []
    model.main.layers[0].k_proj.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    text, features = make_text(6), torch.randn(6, 20, dtype=torch.float64)
    folded = model.fold()
    for run, count in ((model, 2), (folded, 1)):
        calls.clear()
        run(text, features)
        assert len(calls) == count


def test_a_folded_model_saves_and_loads_its_state():
    torch.manual_seed(1)
    model, other = trained(make_fusion("bert", None, cross_dim=20)), make_fusion("bert", None, cross_dim=20)
    other.main.encoder.load_state_dict(model.main.encoder.state_dict())
    text, features = make_text(6), torch.randn(6, 20, dtype=torch.float64)
    folded, target = model.fold(), other.fold()
    target.load_state_dict(folded.state_dict())
    assert torch.equal(target(text, features).logits, folded(text, features).logits)


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).tanh()


def test_a_norm_that_does_not_fold_is_refused():
    encoder = make_dinov2()
    encoder.encoder.layer[1].norm1 = OtherNorm(48).double()
    model = MoPEFusion(encoder, None, 2, MoPEConfig(cross_dim=8)).double().eval()
    with pytest.raises(ValueError, match=r"layer 1 can.t be folded: its norm is OtherNorm"):
        model.fold()
    prompted = PromptTuned(make_dinov2(), 3).double().eval()
    prompted.main.layers[1].module.norm1 = OtherNorm(48).double()
    assert prompted.fold()(make_images(2)).features.shape == (2, 48)


def test_rms_norms_fold():
    encoder = make_dinov2()
    for layer in encoder.encoder.layer:
        layer.norm1 = nn.RMSNorm(48, eps=1e-3).double()
        nn.init.normal_(layer.norm1.weight)
    model = trained(make_fusion(encoder, None, cross_dim=20))
    images, features = make_images(9), torch.randn(9, 20, dtype=torch.float64)
    expected = model(images, features)
    close(model.fold()(images, features).features, expected.features)
    twin = make_fusion(model.unwrap()[0], None, cross_dim=20, mixing="prompt")
    twin.load_state_dict(model.trained_state_dict(), strict=False)
    close(twin(images, features).features, expected.features)


def test_folded_compiles_and_needs_no_recompile_for_another_batch():
    torch._dynamo.reset()
    model = make_fusion(make_bert(num_hidden_layers=1), None, cross_dim=20)
    folded = model.fold()
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for size in (6, 9):
            text, features = make_text(size), torch.randn(size, 20, dtype=torch.float64)
            close(compiled(text, features).logits, folded(text, features).logits)


@pytest.mark.parametrize("main", list(MAKE))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_under_autocast(main, dtype):
    model = trained(make_fusion(main, None, cross_dim=20)).float()
    inputs, features = INPUTS[main](6), torch.randn(6, 20)
    inputs = inputs if isinstance(inputs, dict) else inputs.float()
    exact, folded = model(inputs, features).features, model.fold()
    with torch.autocast("cpu", dtype):
        errors = [(run(inputs, features).features.float() - exact).square().mean().sqrt() for run in (model, folded)]
    assert errors[1] <= 2 * errors[0] + 1e-3


def test_frozen_keeps_the_tables_for_the_block_alone():
    model = trained(make_fusion())
    inputs = make_text(6), make_images(6)
    expected, calls = model(*inputs).logits, []
    projections = [model.main.layers[0].k_proj, model.complementary.main.layers[0].k_proj]
    for projection in projections:
        projection.register_forward_hook(lambda module, args, output: calls.append(module))
    keys = list(model.state_dict())
    with model.frozen() as same, model.frozen():
        assert same is model
        calls.clear()
        for _ in range(2):
            close(model(*inputs).logits, expected)
        assert calls == projections[::-1] * 2, "once a forward, for the tokens"
        assert not model(*inputs).logits.requires_grad
        assert list(model.state_dict()) == keys
        with torch.enable_grad():
            assert model(*inputs).features.requires_grad, "who asks for a gradient gets it"
        assert copy.deepcopy(model)._kept is None, "nobody would drop a copy's"
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.1)
        assert not torch.allclose(model(*inputs).logits, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train().eval(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: nn.ModuleList([model]).load_state_dict(nn.ModuleList([model]).state_dict()),
        lambda model: model.float().double(),
    ],
    ids=["train", "load", "load what holds it", "to another dtype"],
)
def test_frozen_ends_where_weights_may_change(change):
    model = trained(make_fusion())
    inputs = make_text(6), make_images(6)
    with model.frozen():
        for parameter in model.bank.parameters():
            parameter.add_(0.1)
        change(model)
        got = model(*inputs).logits
    with torch.no_grad():
        assert torch.equal(got, model(*inputs).logits)


def test_a_copy_of_a_model_that_was_compiled_in_place_is_its_own():
    torch._dynamo.reset()
    model = make_fusion(make_bert(num_hidden_layers=1), None, cross_dim=20)
    text, features = make_text(6), torch.randn(6, 20, dtype=torch.float64)
    model.compile(backend="eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.bias.add_(1)
    close(twin(text, features).logits, model(text, features).logits + 1)


def test_frozen_is_for_inference():
    message = r"frozen\(\) is for inference, but this MoPEFusion is in training mode: call eval\(\) first"
    with pytest.raises(RuntimeError, match=message), make_fusion().train().frozen():
        pass


def test_a_folded_state_of_an_earlier_version_loads():
    """As it was kept then: products of the router's factors, over no temperature."""
    torch.manual_seed(2)
    model, other = trained(make_fusion("dinov2", None, cross_dim=20)), make_fusion("dinov2", None, cross_dim=20)
    other.main.encoder.load_state_dict(model.main.encoder.state_dict())
    images, features = make_images(6), torch.randn(6, 20, dtype=torch.float64)
    folded, target = model.fold(), other.fold()
    state, temperature = dict(folded.state_dict()), model.config.temperature
    for index in range(len(folded.bank.tables)):
        own = f"bank.tables.{index}."
        state[f"{own}logit_map"] = state.pop(f"{own}router_weight").T @ state.pop(f"{own}router_keys") * temperature
        state[f"{own}static"], state[f"{own}shift"] = state.pop(f"{own}before"), state[f"{own}shift"][None]
        state[f"{own}gram"] = state[f"{own}gram"].transpose(0, 1)
    state["bank.cross_keys"] = state.pop("bank.router_cross") * temperature
    state["bank.logit_shift"] = state.pop("bank.router_shift") * temperature
    target.load_state_dict(state)
    close(target(images, features).logits, folded(images, features).logits)
    close(target(images, features).scores, folded(images, features).scores)


def test_bad_complementary_inputs_are_named():
    folded = make_fusion("bert", None, cross_dim=20).fold()
    with pytest.raises(ValueError, match="complementary_inputs is None"):
        folded(make_text(3))
    with pytest.raises(ValueError, match="the two sides differ in batch size: main has 3 samples, complementary has 4"):
        folded(make_text(3), torch.randn(4, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"cross must be \(B, 20\), got \(3, 19\)"):
        folded(make_text(3), torch.randn(3, 19, dtype=torch.float64))


def test_norms_that_differ_within_a_width_are_refused():
    encoder = make_dinov2()
    encoder.encoder.layer[1].norm1.eps = 1e-2
    model = make_fusion(encoder, None, cross_dim=20)
    images, features = make_images(6), torch.randn(6, 20, dtype=torch.float64)
    twin = make_fusion(model.unwrap()[0], None, cross_dim=20, mixing="prompt")
    twin.load_state_dict(model.trained_state_dict(), strict=False)
    expected, encoder = twin(images, features).features, twin.unwrap()[0]
    again = make_fusion(encoder, None, cross_dim=20, mixing="kv")
    again.load_state_dict(model.trained_state_dict(), strict=False)
    close(again(images, features).features, expected)
    with pytest.raises(ValueError, match="layers of width 48 can't be folded: their norms differ; use the model as it is"):
        again.fold()
