import dataclasses

import pytest
import torch
import torch.nn.functional as F
from op_recorder import Recorder
from tiny_fusion import (
    CLASSES,
    INPUTS,
    SETTINGS,
    WIDTHS,
    close,
    make_bert,
    make_dinov2,
    make_fusion,
    make_images,
    make_text,
    trained,
)
from torch import nn
from transformers import BertForSequenceClassification

from mope_fast import FusionOutput, MoPEConfig, MoPEFusion, MoPELayer, PromptBank, PromptTuned, functional
from mope_fast.encoders.families import check_text
from mope_fast.modules.block_fusion import BlockAwareFusion

CROSS = 20


def feature_fusion(complementary=None, **settings):
    return make_fusion("bert", complementary, cross_dim=CROSS, **settings)


class Black(nn.Module):
    """A complementary model that is no supported encoder."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, CROSS)
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.dropout(self.linear(x))


@pytest.mark.parametrize(("main", "complementary"), [("bert", "dinov2"), ("dinov2", "bert")])
@pytest.mark.parametrize("length", [0, 2])
def test_every_trained_parameter_gets_a_gradient_and_no_encoder_parameter_does(main, complementary, length):
    torch.manual_seed(0)
    model = make_fusion(main, complementary, complementary_prompt_length=length).train()
    output = model(INPUTS[main](6), INPUTS[complementary](6), torch.arange(6) % CLASSES)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        encoder = ".encoder." in name
        assert parameter.requires_grad is not encoder, name
        assert (parameter.grad is None) is encoder, name
        # batch norm takes every shift out of the bias before it
        if not encoder and name != "bank.mapper.down.bias":
            assert parameter.grad.abs().max() > 0, name
    assert (model.complementary.bank is None) is (length == 0)
    assert output.features.shape == (6, WIDTHS[main])


def test_training_mode_never_reaches_the_encoders():
    black = Black()
    for model in (make_fusion().train(), feature_fusion(black).train()):
        assert model.training
        assert model.bank.training
        assert model.head.training
        assert model.main.encoder.config.hidden_dropout_prob > 0
        for name, module in model.named_modules():
            if name.startswith(("main", "complementary.main")) or module is black:
                assert not module.training, name
        assert not model.eval().bank.training
    assert not black.training


def test_encoders_dropout_stays_off_in_training():
    torch.manual_seed(1)
    model = make_fusion(dropout=0.0, noise_std=0.0, mapper_norm="layer").train()
    text, images = make_text(3), make_images(3)
    assert torch.equal(model(text, images).logits, model(text, images).logits)


def test_complementary_may_be_a_callable():
    torch.manual_seed(2)
    weight = torch.randn(6, CROSS, dtype=torch.float64)
    model, text, x = feature_fusion(lambda x: x @ weight), make_text(3), torch.randn(3, 6, dtype=torch.float64)
    output = model(text, x)
    by_hand = feature_fusion()
    by_hand.load_state_dict(model.state_dict())
    close(by_hand(text, x @ weight).logits, output.logits)


def test_complementary_module_is_frozen_in_eval_mode_and_without_gradients():
    torch.manual_seed(3)
    black = Black().train()
    model = feature_fusion(black).train()
    model(make_text(3), torch.randn(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.long)).loss.backward()
    model(make_text(3), {"x": torch.randn(3, 6, dtype=torch.float64)})
    assert black.seen == [(False, False)] * 2
    assert not any(p.requires_grad for p in black.parameters())
    assert not any("linear" in key for key in model.trained_state_dict())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: nn.ModuleDict({"inside": PromptTuned(make_dinov2(), 2)}), "PromptTuned at 'inside' "),
        (lambda: nn.Sequential(PromptBank([8], 6)), "PromptBank at '0' "),
        (lambda: MoPELayer(8, 6), "MoPELayer "),
        (lambda: nn.Sequential(BlockAwareFusion(8, 2)), "PromptFusion at '0.to_text' "),
    ],
)
def test_a_complementary_module_may_not_hold_prompts_that_it_would_freeze(make, kind):
    main, side = make_bert(), make()
    with pytest.raises(
        ValueError, match=f"which would be held frozen, but has a {kind}that is to be trained: pass the PromptTuned"
    ):
        make_fusion(main, side, cross_dim=CROSS)
    assert any(p.requires_grad for p in side.parameters())
    model = make_fusion(main, side.requires_grad_(False), cross_dim=CROSS)  # as they are: no prompt of it is lost
    assert model.complementary is side


@pytest.mark.parametrize("compiled", [False, True])
def test_a_complementary_function_that_would_train_what_nobody_saves_is_refused_in_training(compiled):
    linear, text = nn.Linear(6, CROSS).double(), make_text(3)
    model = feature_fusion(lambda x: linear(x))
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    x = torch.randn(3, 6, dtype=torch.float64)
    run(text, x)  # in eval mode nobody trains
    with pytest.raises(Exception, match=r"would not be saved. Call .requires_grad_\(False\) on its module; pass a PromptTuned"):
        run.train()(text, x)
    linear.requires_grad_(False)
    run(text, x).features.sum().backward()
    x.requires_grad_()  # a gradient of the inputs is no training
    run.train()(text, x).features.sum().backward()
    assert x.grad.abs().sum() > 0


def test_complementary_may_be_features_that_get_gradients():
    torch.manual_seed(4)
    features = torch.randn(3, CROSS, dtype=torch.float64, requires_grad=True)
    feature_fusion()(make_text(3), features, torch.zeros(3, dtype=torch.long)).loss.backward()
    assert (features.grad.abs().amax(-1) > 0).all()


def test_static_prompts_alone_need_no_complementary_side():
    torch.manual_seed(5)
    model = make_fusion("bert", None, use_dynamic=False, use_mapped=False)
    output = model(make_text(3), labels=torch.zeros(3, dtype=torch.long))
    assert output.scores is None
    assert output.importance_loss == 0
    assert set(trained(model)) == {"bank.stacks.32.static_prompt", "head.weight", "head.bias"}
    close(output.loss, output.task_loss, 0)


@pytest.mark.parametrize(
    ("problem_type", "num_classes", "labels", "loss"),
    [
        ("single_label_classification", 5, torch.tensor([0, 4, 2]), F.cross_entropy),
        ("multi_label_classification", 2, torch.tensor([[0, 1], [1, 1], [0, 0]]), F.binary_cross_entropy_with_logits),
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
        ("regression", 2, torch.tensor([[0.5, 1], [-1.0, 0], [2.0, 0]]), F.mse_loss),
    ],
)
def test_loss_is_the_tasks_plus_the_weighted_importance(problem_type, num_classes, labels, loss):
    torch.manual_seed(6)
    model = make_fusion(num_classes=num_classes, problem_type=problem_type, importance_weight=0.5, importance_threshold=0.0)
    output = model(make_text(3), make_images(3), labels)
    task = loss(output.logits, labels if problem_type.startswith("single") else labels.double())
    importance = functional.importance_loss(output.scores, threshold=0.0)
    assert importance > 0
    close(output.task_loss, task)
    close(output.importance_loss, importance)
    close(output.loss, task + 0.5 * importance)


def test_output_is_read_by_attribute_name_and_position():
    torch.manual_seed(7)
    model = make_fusion()
    output = model(make_text(3), make_images(3), torch.zeros(3, dtype=torch.long))
    names = [f.name for f in dataclasses.fields(FusionOutput)]
    assert names == ["loss", "logits", "task_loss", "importance_loss", "scores", "features", "feature_maps", "tokens"]
    assert output.feature_maps is output["feature_maps"] is output.tokens is None
    assert all(output[name] is getattr(output, name) for name in names)
    loss, logits = output
    assert (len(output), output[0] is loss, output[1:][0] is logits) == (2, True, True)
    assert (loss is output.loss, logits is output.logits) == (True, True)
    assert output.logits.shape == (3, CLASSES)
    assert output.scores.shape == (2, 3, SETTINGS["num_experts"])
    with pytest.raises(KeyError, match=r"'logit' is not one of \['loss', 'logits'"):
        output["logit"]


def test_without_a_head_the_features_are_what_has_a_position():
    output = make_fusion(num_classes=None)(make_text(3), make_images(3))
    assert (output.loss, output.logits, output.task_loss) == (None, None, None)
    assert output.to_tuple() == (output[0],) == (output.features,)


def test_own_head_is_used_and_trained():
    torch.manual_seed(8)
    head = nn.Sequential(nn.Linear(WIDTHS["bert"], 7), nn.Tanh(), nn.Linear(7, 2))
    model = make_fusion(num_classes=None, head=head)
    output = model(make_text(3), make_images(3), torch.zeros(3, dtype=torch.long))
    close(output.logits, head(output.features), 0)
    output.loss.backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("settings", [{}, {"learn_keys": True}, {"complementary_prompt_length": 0}, {"use_dynamic": False}])
def test_parameter_groups_hold_every_trained_parameter_once(settings):
    model = make_fusion(**settings)
    groups = model.parameter_groups(1e-3, 2e-3, weight_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in trained(model).values()}
    assert [group["lr"] for group in groups] == ([1e-3] if settings.get("complementary_prompt_length") == 0 else [1e-3, 2e-3])
    assert all(group["weight_decay"] == 0.5 for group in groups)
    torch.optim.AdamW(groups)


def test_complementary_learning_rate_defaults_to_the_main_one():
    assert [group["lr"] for group in make_fusion().parameter_groups(1e-3)] == [1e-3, 1e-3]


def test_a_few_steps_learn_labels_that_only_the_image_knows():
    torch.manual_seed(9)
    model = make_fusion(make_bert(num_hidden_layers=1), make_dinov2(num_hidden_layers=1), num_classes=2).train()
    text, images, labels = make_text(8), make_images(8), torch.tensor([0, 1] * 4)
    text = {key: value[:1].expand(8, -1) for key, value in text.items()}
    images[labels == 1] += 1
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
    losses = []
    for _ in range(15):
        loss = model(text, images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_float32_prompts_fuse_encoders_of_any_dtype(main_dtype):
    torch.manual_seed(10)
    encoders = make_bert().to(main_dtype), make_dinov2().to(main_dtype)
    model = MoPEFusion(*encoders, CLASSES, MoPEConfig(**SETTINGS))
    output = model(make_text(6), make_images(6).to(main_dtype), torch.zeros(6, dtype=torch.long))
    output.loss.backward()
    assert output.features.dtype == main_dtype
    assert output.logits.dtype == output.scores.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained(model).values())


def test_autocast_keeps_scores_and_loss_in_float32():
    torch.manual_seed(11)
    model = MoPEFusion(make_bert().float(), make_dinov2().float(), CLASSES, MoPEConfig(**SETTINGS))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(make_text(6), make_images(6).float(), torch.zeros(6, dtype=torch.long))
    output.loss.backward()
    assert output.scores.dtype == output.importance_loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in trained(model).values())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: MoPEFusion(nn.Linear(2, 2)),
            TypeError,
            "torch's Linear is not a supported encoder: .*Expected one of .*BertModel.*Dinov2Model",
        ),
        (lambda: MoPEFusion("bert"), TypeError, "str is not a supported encoder"),
        (
            lambda: MoPEFusion(BertForSequenceClassification(make_bert(num_hidden_layers=1).config)),
            TypeError,
            r"transformers' BertForSequenceClassification is not a supported encoder: its submodule \.bert is supported, pass that",
        ),
        (lambda: make_fusion(make_bert(is_decoder=True)), TypeError, "it is a decoder .*load it with is_decoder=False"),
        (lambda: make_fusion("bert", None), ValueError, r"can't be inferred: set MoPEConfig\(cross_dim=...\)"),
        (lambda: make_fusion("bert", lambda x: x), ValueError, r"set MoPEConfig\(cross_dim=...\)"),
        (
            lambda: make_fusion("bert", "dinov2", cross_dim=7),
            ValueError,
            "cross_dim is 7, but Dinov2Model gives features of width 48",
        ),
        (lambda: make_fusion("bert", 3), TypeError, "complementary must be .*, got int"),
        (lambda: make_fusion(head=nn.Linear(32, 2)), ValueError, "num_classes .* or head .*, not both"),
        (lambda: make_fusion(num_classes=0), ValueError, "num_classes must be an integer >= 1, got 0"),
        (lambda: make_fusion(problem_type="ranking"), ValueError, "problem_type must be one of .*regression.*got 'ranking'"),
    ],
)
def test_what_can_not_be_fused_is_refused_with_advice(build, error, message):
    with pytest.raises(error, match=message):
        build()


def masked(change):
    text = make_text(3)
    return {**text, "attention_mask": change(text["attention_mask"])}


def four_dimensional_mask():
    return {**make_text(3), "attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)}


def empty_text():
    return {name: value[:0] for name, value in make_text(3).items()}, torch.zeros(0, 20, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, lambda: (make_text(3), None), "complementary_inputs is None"),
        (
            {"num_classes": None},
            lambda: (make_text(3), make_images(3), torch.zeros(3)),
            "labels need a head: give num_classes or head",
        ),
        ({}, lambda: (four_dimensional_mask(), make_images(3)), r"attention_mask must be \(B, S\).*got \(3, 1, 9, 9\)"),
        ({}, lambda: (masked(lambda mask: mask[:2]), make_images(3)), r"\(B, S\) as input_ids \(3, 9\), .*got \(2, 9\)"),
        ({}, lambda: (masked(lambda mask: mask[:, 1:]), make_images(3)), r"\(B, S\) as input_ids \(3, 9\), .*got \(3, 8\)"),
        ({}, lambda: (masked(lambda mask: mask.log()), make_images(3)), "numbers below 0, as additive masks do: .*pass mask == 0"),
        ({}, lambda: (masked(lambda mask: mask.tolist()), make_images(3)), "attention_mask must be a tensor.*got list"),
        ({}, lambda: (make_text(3)["input_ids"] * 0.5, make_images(3)), r"input_ids must be integers \(B, S\), got torch.float32"),
        ({}, lambda: (make_text(3), make_images(2)), "main has 3 samples, complementary has 2"),
        ({}, lambda: (make_text(3), make_images(3)[:0]), "the batch of dinov2 is empty: it needs at least one sample"),
        ({"complementary": None, "cross_dim": 20}, empty_text, "the batch of bert is empty: it needs at least one sample"),
    ],
)
def test_wrong_inputs_are_named(settings, inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_fusion(**settings)(*inputs())


def test_an_additive_mask_that_cannot_be_looked_at_is_refused_where_it_is():
    ids, mask = torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.ones(2, 3, device="meta")
    with Recorder() as recorder:
        check_text({"input_ids": ids, "attention_mask": mask})
    assert "_assert_async" in recorder.names
    model = torch.compile(PromptTuned(make_bert(num_hidden_layers=1), 2).double().eval(), fullgraph=True, backend="aot_eager")
    text = make_text(3)
    real = text["attention_mask"].double()
    assert model({**text, "attention_mask": real}).features.isfinite().all()
    with pytest.raises(RuntimeError, match="numbers below 0, as additive masks do"):
        model({**text, "attention_mask": real.log()})


def test_features_of_a_wrong_width_are_named():
    with pytest.raises(ValueError, match=r"cross must be \(B, 20\), got \(3, 21\)"):
        feature_fusion()(make_text(3), torch.zeros(3, 21, dtype=torch.float64))


@pytest.mark.parametrize(("width", "shape"), [(1, (6,)), (1, (6, 1)), (3, (6, 3))])
def test_regression_labels_of_the_logits_shape_are_taken(width, shape):
    model = make_fusion(num_classes=width, problem_type="regression")
    labels = torch.randn(shape, dtype=torch.float64)
    output = model(make_text(6), make_images(6), labels)
    close(output.task_loss, (output.logits - labels.view(6, width)).square().mean())


def test_batch_norm_on_one_sample_says_what_to_do():
    model = make_fusion().train()
    with pytest.raises(ValueError, match=r"drop_last=True.*mapper_norm='layer'"):
        model(make_text(1), make_images(1))
    make_fusion(mapper_norm="layer").train()(make_text(1), make_images(1))
