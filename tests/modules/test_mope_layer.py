import pytest
import torch
from prompt_setups import CROSS, DIM, EXPERTS, LENGTH, SETTINGS, close, make_bank, make_inputs, make_layer
from torch import nn

from mope_fast import MoPELayer, PromptBank, functional, reference


def with_bias(x, linear):
    """The paper's projections have no bias: append a constant feature that carries it."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=-1), torch.cat([linear.weight, linear.bias[:, None]], dim=1).T


def test_layer_follows_the_papers_equations():
    torch.manual_seed(0)
    layer = make_layer()
    x, cross, mapped = make_inputs(5)
    out = layer(x, cross, mapped)

    psi_y, w_y = with_bias(cross, layer.cross_proj)
    x_0, w_x = with_bias(x[:, 0], layer.inter_proj)
    # ours are ordered [inter | cross], the paper's [cross | inter]
    keys = layer.keys.roll(-2, dims=1)
    scores = reference.routing_scores(psi_y, x_0, w_y, w_x, keys, temperature=0.1)
    dynamic = reference.dynamic_prompt(scores, layer.experts)
    sequence = reference.prompted_sequence(x[:, 0], layer.static_prompt, dynamic, mapped, x[:, 1:])

    close(out.scores, scores)
    close(out.dynamic, dynamic)
    close(torch.cat([x[:, :1], out.prompts, x[:, 1:]], dim=1), sequence)
    close(out.importance_loss, reference.importance_loss(scores))


@pytest.mark.parametrize(("top_k", "renormalize"), [(1, False), (2, False), (2, True)])
def test_gate_keeps_the_largest_of_the_papers_scores(top_k, renormalize):
    torch.manual_seed(1)
    layer = make_layer()
    gated = make_layer(top_k=top_k, renormalize=renormalize)
    gated.load_state_dict(layer.state_dict())
    x, cross, _ = make_inputs(6)
    dense, out = layer(x, cross).scores, gated(x, cross)
    threshold = dense.sort(-1, descending=True).values[:, top_k - 1 : top_k]
    expected = torch.where(dense >= threshold, dense, 0.0)
    expected = expected / expected.sum(-1, keepdim=True) if renormalize else expected
    close(out.scores, expected)
    close(out.dynamic, reference.dynamic_prompt(expected, gated.experts))


def test_global_feature_routes_like_a_sequence_that_starts_with_it():
    torch.manual_seed(2)
    layer = make_layer()
    x, cross, _ = make_inputs(3)
    close(layer(x[:, 0], cross).scores, layer(x, cross).scores, 0)


def test_prompts_are_static_then_dynamic_then_mapped():
    torch.manual_seed(3)
    layer = make_layer()
    x, cross, mapped = make_inputs(5)
    out = layer(x, cross, mapped)
    assert out.prompts.shape == (5, 2 * LENGTH + 1, DIM)
    static, dynamic, last = out.prompts.split([LENGTH, LENGTH, 1], dim=1)
    close(static, layer.static_prompt.expand(5, -1, -1), 0)
    close(dynamic, out.dynamic, 0)
    close(last[:, 0], mapped, 0)


def test_static_view_owns_no_memory_for_the_batch():
    out = make_layer()(*make_inputs(5))
    assert out.static.stride(0) == 0


def test_state_dict_names_and_shapes_are_the_published_ones():
    shapes = {key: tuple(value.shape) for key, value in make_layer().state_dict().items()}
    assert shapes == {
        "static_prompt": (LENGTH, DIM),
        "experts": (EXPERTS, LENGTH, DIM),
        "keys": (EXPERTS, 5),
        "inter_proj.weight": (2, DIM),
        "inter_proj.bias": (2,),
        "cross_proj.weight": (3, CROSS),
        "cross_proj.bias": (3,),
    }


def test_defaults_are_the_papers():
    layer = MoPELayer(DIM, CROSS)
    assert layer.experts.shape == (16, 6, DIM)
    assert layer.keys.shape == (16, 10)
    assert (layer.config.temperature, layer.config.noise_std, layer.config.dropout) == (0.1, 1 / 256, 0.1)


@pytest.mark.parametrize("make", [make_layer, make_bank])
@pytest.mark.parametrize("learn_keys", [False, True])
def test_keys_are_trained_only_on_request_and_always_saved(make, learn_keys):
    module = make(learn_keys=learn_keys)
    assert ("keys" in dict(module.named_parameters())) is learn_keys
    assert "keys" in module.state_dict()


@pytest.mark.parametrize("num_experts", [3, 5, 9])
def test_keys_start_orthogonal(num_experts):
    keys = make_layer(num_experts=num_experts).keys
    # more keys than dimensions can't be orthonormal, the dimensions then are
    gram = keys @ keys.T if num_experts <= 5 else keys.T @ keys
    # drawn and orthogonalised in float32
    close(gram, torch.eye(len(gram), dtype=gram.dtype), 1e-5)


def test_prompts_start_within_the_init_bound():
    layer = MoPELayer(DIM, CROSS, prompt_init=0.02)
    for prompts in (layer.static_prompt, layer.experts):
        assert 0.01 < prompts.abs().max() <= 0.02
    assert MoPELayer(DIM, CROSS).experts.abs().max() <= (6 / (768 + DIM)) ** 0.5


@pytest.mark.parametrize("use_mapped", [False, True])
@pytest.mark.parametrize("use_dynamic", [False, True])
@pytest.mark.parametrize("use_static", [False, True])
def test_ablated_layer_gives_exactly_the_remaining_prompts(use_static, use_dynamic, use_mapped):
    torch.manual_seed(4)
    full, ablated = make_layer(), make_layer(use_static=use_static, use_dynamic=use_dynamic)
    ablated.load_state_dict({key: value for key, value in full.state_dict().items() if key in ablated.state_dict()})
    x, cross, mapped = make_inputs(3)
    if not (use_static or use_dynamic or use_mapped):
        with pytest.raises(ValueError, match="no prompt is left"):
            ablated(x, cross, None)
        return
    out, everything = ablated(x, cross, mapped if use_mapped else None), full(x, cross, mapped)
    flags = {"static": use_static, "dynamic": use_dynamic, "mapped": use_mapped}
    kept = [getattr(everything, name) for name, used in flags.items() if used]
    close(out.prompts, torch.cat(kept, dim=1), 0)
    assert [getattr(out, name) is not None for name in flags] == list(flags.values())
    assert (out.scores is not None) is use_dynamic
    assert out.importance_loss.shape == ()
    if not use_dynamic:
        assert out.importance_loss == 0


def test_without_dynamic_prompts_no_complementary_feature_is_needed():
    layer = make_layer(use_dynamic=False)
    assert set(layer.state_dict()) == {"static_prompt"}
    assert layer(make_inputs(2)[0]).prompts.shape == (2, LENGTH, DIM)


@pytest.mark.parametrize("kind", ["layer", "bank"])
@pytest.mark.parametrize(("training", "noise_std", "noisy"), [(True, 0.5, True), (True, 0.0, False), (False, 0.5, False)])
def test_noise_is_drawn_in_training_only(kind, training, noise_std, noisy):
    torch.manual_seed(5)
    make = make_layer if kind == "layer" else make_bank
    module = make(noise_std=noise_std, dropout=0.0).train(training)
    x, cross, _ = make_inputs(3)
    first, second = (module(x, cross) if kind == "layer" else module.layer(0, x, module.prepare(cross)) for _ in range(2))
    assert torch.equal(first.scores, second.scores) is not noisy


def test_training_noise_has_the_configured_deviation_behind_the_temperature():
    torch.manual_seed(6)
    layer = make_layer(noise_std=0.5).train()
    x, cross, _ = make_inputs(1)
    x, cross = x.expand(4000, -1, -1), cross.expand(4000, -1)
    noise = layer(x, cross).scores.log() - layer.eval()(x, cross).scores.log()
    # the softmax hides a shift of each row; the difference of two experts' noise has variance 2 std^2
    deviation = (noise[:, 0] - noise[:, 1]).std() / 2**0.5
    # 4000 draws: the estimate has a standard error of 1.1 %
    assert abs(deviation - 0.5) < 0.03


def test_eval_mode_is_deterministic():
    torch.manual_seed(7)
    bank = make_bank(dropout=0.5, noise_std=0.5, dynamic_dropout=0.5)
    x, cross, _ = make_inputs(3)
    first, second = (bank.layer(1, x, bank.prepare(cross)).prompts for _ in range(2))
    assert torch.equal(first, second)


def test_static_dropout_is_one_mask_for_the_whole_batch():
    torch.manual_seed(8)
    layer = make_layer(dropout=0.5).train()
    static = layer(*make_inputs(4)).static
    close(static, static[:1].expand_as(static), 0)
    kept = static[0] != 0
    assert 0.2 < kept.double().mean() < 0.8
    close(static[0][kept], 2 * layer.static_prompt[kept], 1e-14)


def test_mapped_dropout_is_drawn_for_each_sample():
    torch.manual_seed(9)
    layer = make_layer(dropout=0.5).train()
    x, cross, _ = make_inputs(4)
    mapped = layer(x, cross, torch.ones(4, DIM, dtype=torch.float64)).mapped[:, 0]
    assert set(mapped.unique().tolist()) == {0.0, 2.0}
    assert len(mapped.unique(dim=0)) == 4


@pytest.mark.parametrize(("dynamic_dropout", "drops"), [(0.0, False), (0.5, True)])
def test_dynamic_prompts_are_dropped_only_on_request(dynamic_dropout, drops):
    torch.manual_seed(10)
    layer = make_layer(dropout=0.5, dynamic_dropout=dynamic_dropout).train()
    assert bool((layer(*make_inputs(4)).dynamic == 0).any()) is drops


@pytest.mark.parametrize("mixing", ["auto", "prompt", "kv"])
def test_samples_do_not_see_their_batch(mixing):
    torch.manual_seed(11)
    bank = make_bank(mixing=mixing)
    k_proj, v_proj = nn.Linear(DIM, DIM).double(), nn.Linear(DIM, DIM).double()
    x, cross, _ = make_inputs(5)

    def run(rows):
        out = bank.layer(1, x[rows], bank.prepare(cross[rows]))
        (_, (keys, values)) = out.key_value(nn.LayerNorm(DIM).double(), k_proj, v_proj, 4)
        return out.prompts, out.scores, keys, values

    alone = [run(slice(i, i + 1)) for i in range(5)]
    for together, parts in zip(run(slice(0, 5)), zip(*alone, strict=True), strict=True):
        close(together, torch.cat(parts), 1e-12)


@pytest.mark.parametrize("mixing", ["auto", "prompt", "kv"])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(DIM).double()])
def test_an_empty_batch_gives_empty_prompts(mixing, norm):
    torch.manual_seed(12)
    bank = make_bank(mixing=mixing)
    linear = nn.Linear(DIM, DIM).double()
    x, cross, _ = make_inputs(0)
    out = bank.layer(0, x, bank.prepare(cross))
    static, rest = out.key_value(norm, linear, linear, 4)
    assert out.prompts.shape == (0, 2 * LENGTH + 1, DIM)
    assert out.scores.shape == (0, EXPERTS)
    assert [tuple(t.shape) for t in (*static, *rest)] == [(0, 4, LENGTH, 8)] * 2 + [(0, 4, LENGTH + 1, 8)] * 2
    assert out.importance_loss == 0
    (out.prompts.sum() + rest[0].sum() + out.importance_loss).backward()
    assert torch.count_nonzero(bank.stacks[str(DIM)].experts.grad) == 0


def test_importance_loss_uses_the_configured_threshold():
    torch.manual_seed(13)
    x, cross, _ = make_inputs(6)
    for threshold, layer in ((t, make_layer(importance_threshold=t)) for t in (0.0, 1e3)):
        out = layer(x, cross)
        close(out.importance_loss, functional.importance_loss(out.scores, threshold=threshold), 0)
        assert bool(out.importance_loss > 0) is (threshold == 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, c, p: m(x[..., :5], c), r"x must be \(B, 32\) or \(B, S, 32\), got \(2, 7, 5\)"),
        (lambda m, x, c, p: m(x[None], c), r"x must be .* got \(1, 2, 7, 32\)"),
        (lambda m, x, c, p: m(x[:, :0], c), r"at least one token, got \(2, 0, 32\)"),
        (lambda m, x, c, p: m(x, c[:, :5]), r"cross must be \(B, 20\), got \(2, 5\)"),
        (lambda m, x, c, p: m(x, c[:1]), "cross has batch 1, expected 2"),
        (lambda m, x, c, p: m(x, c, p[:1]), "mapped has batch 1, expected 2"),
        (lambda m, x, c, p: m(x, c, p[:, None]), r"mapped must be \(B, 32\), got \(2, 1, 32\)"),
    ],
)
def test_wrong_inputs_are_named_with_their_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_layer(), *make_inputs(2))


def test_missing_complementary_feature_is_named():
    with pytest.raises(TypeError, match=r"cross must be a torch.Tensor \(B, 20\), got NoneType"):
        make_layer()(make_inputs(2)[0])


def test_bank_refuses_what_it_can_not_build():
    with pytest.raises(ValueError, match=r"at least one layer.* got \(\)"):
        PromptBank([], CROSS)
    with pytest.raises(ValueError, match=r"integers >= 1; got \(32, 0\)"):
        PromptBank([32, 0], CROSS)
    with pytest.raises(ValueError, match="cross_dim is None"):
        PromptBank([32], None)


def test_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="expertz"):
        MoPELayer(DIM, CROSS, expertz=3)


def test_repr_says_the_sizes():
    assert "dim=32, cross_dim=20, num_experts=4, prompt_length=3" in repr(make_layer())
    assert f"layers=2, cross_dim=20, num_experts={SETTINGS['num_experts']}" in repr(make_bank())


@pytest.mark.parametrize("name", ["x", "cross", "mapped"])
def test_integers_are_refused(name):
    inputs = {"x": torch.zeros(2, 8), "cross": torch.zeros(2, 5), "mapped": torch.zeros(2, 8)}
    inputs[name] = inputs[name].long()
    with pytest.raises(TypeError, match=rf"{name} must have a floating-point dtype, got torch\.int64"):
        MoPELayer(8, 5)(**inputs)
