"""Several complementary sides by name: each its own encoder, its own prompts, and perhaps missing."""

import json

import pytest
import torch
from tiny_fusion import CLASSES, DETERMINISTIC, SETTINGS, close, make_bert, make_dinov2, make_images, make_text, trained
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, MultiAdapter, PromptedEncoder, PromptTuned, Side, start_prompts

B, T = 5, 3


class Bag(nn.Module):
    """A trained bag of words, with dropout and a norm whose statistics are to be saved."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Linear(6, 7), nn.BatchNorm1d(7)

    def forward(self, counts):
        return self.norm(self.words(counts)).relu()


def make_model(sides=None, main=None, **settings):
    """Text, pictures, video and a bag of words, of which pictures and the bag may be missing."""
    torch.manual_seed(0)
    if sides is None:
        sides = {
            "picture": Side(make_dinov2(), optional=True),
            "video": Side(make_dinov2(num_hidden_layers=2), frames="max", prompt_length=1),
            "words": Side(Bag(), trainable=True, optional=True, width=7),
        }
    config = MoPEConfig(**{**SETTINGS, **settings})
    return MoPEFusion(make_bert() if main is None else main, sides, CLASSES, config).double().eval()


def make_inputs(batch=B):
    torch.manual_seed(1)
    video = make_images(batch * T).unflatten(0, (batch, T))
    words = torch.rand(batch, 6, dtype=torch.float64)
    return make_text(batch), {"picture": make_images(batch), "video": video, "words": words}


def masks(**missing):
    """Name -> mask, False at these samples."""
    return {name: torch.tensor([i not in rows for i in range(B)]) for name, rows in missing.items()}


def encoders_of(model):
    return {name: source.value for name, source in model.complementary.sources().items()}


def test_three_frozen_sides_are_one_of_their_features_side_by_side():
    torch.manual_seed(0)
    bert, parts = make_bert(), {"left": nn.Linear(6, 4), "right": nn.Linear(6, 3)}
    sides = {name: Side(part, width=part.out_features) for name, part in parts.items()}
    model = make_model({**sides, "given": Side(width=2)}, bert)
    text, x = make_text(B), {"left": torch.randn(B, 6), "right": torch.randn(B, 6), "given": torch.randn(B, 2)}
    x = {name: value.double() for name, value in x.items()}
    got = model(text, x)
    cross = torch.cat([parts["left"](x["left"]), parts["right"](x["right"]), x["given"]], dim=1).detach()
    state = dict(model.trained_state_dict().items())
    model.unwrap()
    by_hand = MoPEFusion(bert, None, CLASSES, MoPEConfig(**SETTINGS, side_dims=(4, 3, 2))).double().eval()
    by_hand.load_state_dict(state, strict=False)
    expected = by_hand(text, cross)
    close(got.logits, expected.logits)
    close(got.scores, expected.scores)


def test_each_side_has_prompts_of_its_own_and_all_that_is_trained_gets_a_gradient():
    model = make_model(**DETERMINISTIC, importance_threshold=0.0).train()
    text, others = make_inputs()
    model(text, others, torch.arange(B)).loss.backward()
    # what nothing took the place of is in the graph too, or DDP would wait for it
    assert all(parameter.grad is not None for parameter in trained(model).values())
    assert all(row.grad.abs().max() == 0 for row in model.complementary.stand_ins.values())
    sides = encoders_of(model)
    assert sides["picture"].bank.config.prompt_length == SETTINGS["complementary_prompt_length"]
    assert sides["video"].bank.config.prompt_length == 1
    assert sides["words"].training
    assert sides["words"].words.weight.grad.abs().max() > 0
    expected = torch.cat([sides["picture"].eval()(others["picture"]).features], dim=1)
    close(model.eval().complementary_feature(others)[:, :48], expected)


def test_summed_features_have_one_mapped_prompt():
    model = make_model({"a": Side(nn.Linear(6, 4), width=4), "b": Side(nn.Linear(6, 4), width=4, optional=True)}, combine="sum")
    a, b = model.complementary.sides["a"], model.complementary.sides["b"]
    x = torch.randn(B, 6, dtype=torch.float64)
    close(model.complementary_feature({"a": x, "b": x}), a(x) + b(x))
    assert model.config.cross_dim == 4
    assert model.config.side_dims is None
    with pytest.raises(ValueError, match=r"combine='sum' needs features of equal width, got \{'a': 4, 'b': 3\}"):
        make_model({"a": Side(nn.Linear(6, 4), width=4), "b": Side(nn.Linear(6, 3), width=3)}, combine="sum")


@pytest.mark.parametrize("training", [False, True])
def test_a_missing_side_is_its_stand_in_and_moves_no_other_sample(training):
    model = make_model(**DETERMINISTIC, mapper_norm="layer").train(training)
    encoders_of(model)["words"].eval()  # its batch norm is a statistic of the batch
    with torch.no_grad():
        model.complementary.stand_ins["picture"].fill_(0.75)
    text, others = make_inputs()
    whole = model(text, others)
    # whatever stands in the place of the missing ones
    broken = {**others, "picture": others["picture"].clone()}
    broken["picture"][[1, 3]] *= 50
    part = model(text, {**broken, "present": masks(picture=(1, 3))})
    here = [0, 2, 4]
    close(part.logits[here], whole.logits[here])
    assert (part.logits[[1, 3]] - whole.logits[[1, 3]]).abs().max() > 1e-3
    close(model.complementary({**broken, "present": masks(picture=(1, 3))})[[1, 3], :48], torch.full((2, 48), 0.75).double())
    part.logits.sum().backward()
    grad = model.complementary.stand_ins["picture"].grad
    assert grad.abs().max() > 0
    # all missing, in three ways
    nobody = model(text, {**others, "present": masks(picture=range(B))}).logits
    close(model(text, {**others, "picture": None}).logits, nobody)
    close(model(text, {name: value for name, value in others.items() if name != "picture"}).logits, nobody)


def test_what_is_no_number_reaches_nothing_where_its_side_is_missing():
    sides = {"given": Side(width=4, optional=True), "picture": Side(make_dinov2(), optional=True)}
    model, given, pictures = make_model(sides).train(), torch.randn(B, 4, dtype=torch.float64), make_images(B)
    given[2] = pictures[3] = torch.nan
    inputs = {"given": given, "picture": pictures, "present": masks(given=(2,), picture=(3,))}
    model(make_text(B), inputs, torch.arange(B)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())


def test_rows_of_a_missing_side_are_such_as_its_encoder_takes():
    class Unit(nn.Module):
        """Zeros would be NaN in its gradients."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 7)

        def forward(self, x):
            return self.linear(x / x.norm(dim=1, keepdim=True))

    for missing in ((1,), range(B)):
        model = make_model({"words": Side(Unit(), trainable=True, optional=True, width=7)}).train()
        model(make_text(B), {"words": torch.rand(B, 6).double(), "present": masks(words=missing)}, torch.arange(B)).loss.backward()
        assert all(p.grad.isfinite().all() for p in trained(model).values())


def test_frames_that_are_not_there_reach_nothing():
    model = make_model({"video": Side(make_dinov2(), frames="max")}).train()
    video, mask = make_images(B * T).unflatten(0, (B, T)), torch.ones(B, T, dtype=torch.bool)
    mask[:, 2] = False
    video[:, 2] = torch.nan
    inputs = {"video": {"frames": video, "frame_mask": mask}}
    model(make_text(B), inputs, torch.arange(B)).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values())
    start_prompts(model, [{"main_inputs": make_text(B), "complementary_inputs": inputs}], progress=False)


def test_sides_run_compiled_under_autocast_and_in_16_bits():
    model = make_model().float()
    text, others = make_inputs()
    inputs = {**{name: value.float() for name, value in others.items()}, "present": masks(picture=(1,), words=(0, 3))}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for given in (inputs, {**inputs, "picture": None, "present": masks(words=(0,))}):
            expected = model(text, given).logits
            torch.testing.assert_close(compiled(text, given).logits, expected, atol=1e-5, rtol=1e-5)
        expected = model(text, inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(text, inputs).logits.float(), expected, atol=0.05, rtol=0.05)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        compiled(text, inputs, torch.arange(B)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())
    expected, low = make_model().float()(text, inputs).logits, make_model().bfloat16()
    inputs = {**{name: value.bfloat16() for name, value in others.items()}, "present": inputs["present"]}
    torch.testing.assert_close(low(text, inputs).logits.float(), expected, atol=0.05, rtol=0.05)


def test_side_dropout_takes_optional_sides_away_in_training_only():
    sides = {"given": Side(width=4, optional=True), "other": Side(width=3)}
    model = make_model(sides, side_dropout=0.25).train()
    inputs = {"given": torch.ones(4000, 4).double(), "other": torch.ones(4000, 3).double()}
    got = model.complementary(inputs)
    assert (got[:, 4:] == 1).all()
    assert (got[:, :4] == got[:, :1]).all()
    assert abs(got[:, 0].mean().item() - 0.75) < 0.03
    assert (model.eval().complementary(inputs) == 1).all()
    with pytest.raises(ValueError, match="side_dropout is for sides that may be missing"):
        make_model({"given": Side(width=4)}, side_dropout=0.1)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_frames_are_pooled_over_those_that_are_there(how):
    model = make_model({"video": Side(make_dinov2(), frames=how)})
    video, tuned = make_images(B * T).unflatten(0, (B, T)), encoders_of(model)["video"]
    frames = torch.stack([tuned(video[:, t]).features for t in range(T)], dim=1)
    whole = model.complementary({"video": video})
    close(whole, frames.mean(1) if how == "mean" else frames.amax(1))
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 1:], mask[3, 0] = False, False
    video[~mask] *= 100
    named = model.complementary({"video": {"pixel_values": video, "frame_mask": mask}})
    bare = model.complementary({"video": {"frames": video, "frame_mask": mask}})
    for b in range(B):
        kept = frames[b][mask[b]]
        close(named[b], kept.mean(0) if how == "mean" else kept.amax(0))
    close(bare, named)


def test_a_missing_video_may_have_no_frame_and_leaves_gradients_finite():
    for how in ("mean", "max"):
        model = make_model({"video": Side(make_dinov2(), frames=how, optional=True)}).train()
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[2] = False
        video = {"pixel_values": make_images(B * T).unflatten(0, (B, T)), "frame_mask": mask}
        output = model(make_text(B), {"video": video, "present": {"video": mask.any(1)}}, torch.arange(B))
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())


def test_a_save_holds_what_each_side_is(tmp_path):
    model = make_model()
    text, others = make_inputs()
    model.train()(text, others)  # statistics of the bag's norm
    model.eval()
    with torch.no_grad():
        model.complementary.stand_ins["words"].fill_(-1)
    others["present"] = masks(words=(0,))
    expected = model(text, others).logits
    model.save_pretrained(tmp_path)
    main, given = model.unwrap()
    given["words"] = Bag()
    # in another order, without their facts
    again = MoPEFusion.from_pretrained(tmp_path, main, {name: given[name] for name in ("words", "video", "picture")}).double()
    close(again(text, others).logits, expected, 1e-5)
    assert [(name, side.frames) for name, side in again.complementary.facts.items()] == [
        ("picture", None), ("video", "max"), ("words", None)
    ]  # fmt: skip
    again.unwrap()
    with pytest.raises(ValueError, match=r"saved with the sides \['picture', 'video', 'words'\], got \['picture'\]"):
        MoPEFusion.from_pretrained(tmp_path, main, {"picture": given["picture"]})
    with pytest.raises(ValueError, match=r"complementary: saved with .*'frames': 'max'.*got .*'frames': 'mean'"):
        MoPEFusion.from_pretrained(tmp_path, main, {**given, "video": Side(given["video"], frames="mean")})
    file = tmp_path / "mope_fast.json"
    description = json.loads(file.read_text())
    description["complementary"][0].pop("width")
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"mope_fast\.json is damaged"):
        MoPEFusion.from_pretrained(tmp_path, main, given)


def test_a_trained_module_is_the_models_and_a_held_one_is_not(tmp_path):
    model = make_model({"held": Side(Bag(), width=7), "words": Side(Bag(), trainable=True, width=7)}).train()
    names = trained(model)
    assert "complementary.sides.words.words.weight" in names
    assert "complementary.sides.held.words.weight" not in names
    assert model.frozen_parts() == ["main", "complementary.sides.held"]
    assert encoders_of(model)["words"].training
    assert not encoders_of(model)["held"].training
    held = encoders_of(model)["held"]
    model.unwrap()
    assert held.training
    assert held.words.weight.requires_grad


def test_every_side_has_its_own_learning_rate():
    model = make_model()
    groups = model.parameter_groups(1e-3, {"video": 2e-3, "words": 3e-3})
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 2e-3, 3e-3]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained(model).values()}
    assert [group["lr"] for group in model.parameter_groups(1e-3, 5e-4)] == [1e-3, 5e-4, 5e-4, 5e-4]
    bag = Bag()
    twice = make_model({name: Side(bag, trainable=True, width=7) for name in ("left", "right")})
    torch.optim.AdamW(twice.parameter_groups(1e-3))  # what both share is there once
    with pytest.raises(ValueError, match=r"complementary_lr has \['sound'\]: this model's sides are"):
        model.parameter_groups(1e-3, {"sound": 1})


def test_folded_frozen_and_checkpointed_it_is_the_same():
    model = make_model(**DETERMINISTIC)
    text, others = make_inputs()
    others["present"] = masks(picture=(1, 2))
    expected = model(text, others)
    folded = model.fold()
    with torch.no_grad(), model.frozen():
        close(model(text, others).logits, expected.logits)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = torch.utils._pytree.tree_map(lambda _: {0: batch}, (text, others))
    exported = torch.export.export(folded.for_export(), (text, others), dynamic_shapes=shapes).module()
    close(exported(text, others), expected.logits)
    expected.logits.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in trained(model).items()}
    assert [name for name, grad in grads.items() if grad is None] == ["complementary.stand_ins.words"]  # nobody lacks them
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(text, others).logits.square().sum().backward()
    for name, parameter in trained(model).items():
        close(parameter.grad, grads[name])
    with torch.no_grad():  # a folded model doesn't learn from the one that it was made of
        for parameter in trained(model).values():
            parameter.add_(1)
    close(folded(text, others).logits, expected.logits)
    assert not [name for name, parameter in folded.named_parameters() if parameter.requires_grad]


def test_it_stands_beside_other_adapters():
    shared = PromptedEncoder(make_bert())
    several = make_model(main=shared)
    plain = PromptTuned(shared, 2, 3).double().eval()
    both = MultiAdapter({"several": several, "plain": plain})
    text, others = make_inputs()
    others["words"] = None
    got = both(text, ["several", "plain", "several", "plain", "several"], {"several": others})
    expected = several(text, others).logits
    close(got.logits[::2], expected[::2])


def test_sides_are_given_by_their_names_too():
    model = make_model()
    text, others = make_inputs()
    close(model(**text, **others).logits, model(text, others).logits)
    with pytest.raises(TypeError, match="neither side takes sound by name"):
        model(**text, **others, sound=others["words"])


def test_prompts_of_every_side_start_among_its_tokens():
    model = make_model()
    text, others = make_inputs()
    here = masks(picture=(1, 2))
    others["picture"][[1, 2]] = 1e6
    start_prompts(model, [{"main_inputs": text, "complementary_inputs": {**others, "present": here}}], progress=False)
    rows = model.complementary.sides["picture"].bank.stacks["48"].static_prompt
    assert rows.abs().max() < 100  # rows of missing samples are not counted
    # nobody has it: its prompts stay
    before = rows.clone()
    start_prompts(model, [{"main_inputs": text, "complementary_inputs": {**others, "picture": None}}], progress=False)
    assert torch.equal(rows, before)
    with pytest.raises(ValueError, match="side 'video' is missing, but was not declared optional"):
        start_prompts(model, [{"main_inputs": text}], progress=False)


def test_encoders_are_given_back():
    bert, dinov2, bag = make_bert(), make_dinov2(), Bag()
    shared = PromptedEncoder(make_dinov2())
    model = make_model({"picture": dinov2, "shared": shared, "bag": Side(bag, width=7)}, bert)
    main, others = model.unwrap()
    assert main is bert
    assert others["picture"] is dinov2
    assert others["bag"] is bag
    assert bag.words.weight.requires_grad
    assert dinov2.layernorm.weight.requires_grad
    assert not shared.encoder.layernorm.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {**x, "video": None}, "side 'video' is missing, but was not declared"),
        (lambda x: {**x, "sound": x["words"]}, r"complementary_inputs has \['sound'\]: this model's sides are"),
        (lambda x: x["picture"], "complementary_inputs must be a dict of"),
        (lambda x: {**x, "words": x["words"][:3]}, "main has 5 samples, words has 3"),
        (lambda x: {**x, "video": x["video"][:, :0]}, "'video' has videos without frames"),
        (lambda x: {**x, "video": x["video"][0, 0, 0, 0]}, "'video' is a side of frames: its inputs must be tensors"),
        (lambda x: {**x, "video": {"frames": x["video"], "frame_mask": torch.zeros(B, T).bool()}}, "video 0 of the batch has no"),
        (lambda x: {**x, "video": {"pixel_values": x["video"], "frame_mask": torch.ones(B, 2).bool()}}, "of the same B and T"),
        (lambda x: {**x, "present": {"video": torch.ones(B).bool()}}, "'present' has a mask for 'video', but the optional"),
        (lambda x: {**x, "present": {"words": torch.ones(B)}}, r"present\['words'\] must be a bool tensor"),
        (lambda x: {**x, "present": {"words": torch.ones(2).bool()}}, r"main has 5 samples, present\['words'\] has 2"),
        (lambda x: {**x, "words": None, "present": {"words": torch.ones(B).bool()}}, "but 'words' is None"),
        (lambda x: {**x, "present": torch.ones(B).bool()}, r"complementary_inputs\['present'\] must be a dict"),
    ],
)  # fmt: skip
def test_inputs_that_can_not_be_meant_are_refused(change, message):
    text, others = make_inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        make_model()(text, change(others))


def both_trained_and_held(bag):
    return {"a": Side(bag, trainable=True, width=7), "b": Side(bag, width=7)}


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (dict, "complementary is an empty dict"),
        (lambda: {"items": None}, "a side can't be called 'items'"),
        (lambda: {"present": None}, "a side can't be called 'present'"),
        (lambda: {"training": None}, "a side can't be called 'training'"),
        (lambda: {"tokens": None}, "a side can't be called 'tokens'"),
        (lambda: {"a": make_model({"b": Side(width=3)}).fold()}, r"'a'\] can't be a folded fusion"),
        (lambda: {"a.b": None}, "a side can't be called 'a.b'"),
        (lambda: {3: None}, "names of complementary sides must be strings, got 3"),
        (lambda: Side(None, width=3), "is a Side without a name: give it one"),
        (lambda: dict.fromkeys("ab", make_dinov2()), "already takes prompts from another model, or from another side of this one"),
        (lambda: {"a": 3}, r"complementary\['a'\] must be a supported encoder, a callable or None, got int"),
        (lambda: {"a": None}, r"the width of the feature of \['a'\] can't be inferred"),
        (lambda: {"a": Side(make_dinov2(), width=3)}, "Side.width of 'a' is 3, but Dinov2Model gives features of width 48"),
        (lambda: {"a": Side(make_dinov2(), trainable=True)}, "trainable=True trains a whole module, but a Dinov2Model is kept"),
        (lambda: {"a": Side(lambda x: x, trainable=True, width=3)}, "trainable=True needs a module, got function"),
        (lambda: {"a": Side(Bag().requires_grad_(False), trainable=True, width=7)}, "no parameter of the Bag requires a gradient"),
        (lambda: both_trained_and_held(Bag()), "a is a part of a frozen module"),
        (lambda: {"a": make_model()}, r"complementary\['a'\] can't be a MoPEFusion"),
        (lambda: {"a": Side(nn.Sequential(make_model()), trainable=True, width=3)}, "routed prompts at '0.bank', whose importance"),
        (lambda: {"a": Side(nn.Sequential(make_model()), width=3)}, "which would be held frozen, but has a MoPEFusion at '0'"),
        (lambda: {"a": Side(PromptTuned(make_dinov2(), 2), prompt_length=3)}, "prompt_length=3 was requested, but a, PromptTuned"),
        (lambda: {"a": Side(PromptTuned(make_dinov2(), 2), pooling="mean")}, "pooling='mean' was requested, but a, PromptTuned"),
    ],
)  # fmt: skip
def test_sides_that_can_not_be_meant_are_refused_and_nothing_stays_held(sides, message):
    bert, sides = make_bert(), sides()
    with pytest.raises((ValueError, TypeError), match=message):
        make_model(sides, bert)
    assert bert.training is False or bert.pooler.dense.weight.requires_grad
    MoPEFusion(bert, None, 2, MoPEConfig(cross_dim=3)).unwrap()


def test_settings_of_several_sides_need_several():
    for settings in ({"side_dropout": 0.1}, {"combine": "sum"}):
        with pytest.raises(ValueError, match="are for several sides, which are given as a dict by name"):
            MoPEFusion(make_bert(), None, 2, MoPEConfig(cross_dim=3, **settings))


def test_settings_of_a_side_are_checked():
    for settings, message in (
        ({"frames": "sum"}, "frames must be 'mean', 'max' or None, got 'sum'"),
        ({"width": 0}, "width must be >= 1"),
        ({"prompt_length": -1}, "prompt_length must be >= 0"),
        ({"optional": 1}, "Side.optional must be bool"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Side(None, **settings)


def test_joint_batches_count_a_models_own_losses_only():
    model = make_model(**DETERMINISTIC, importance_threshold=0.0)
    text, others = make_inputs()
    model.train()
    alone = model(text, others, torch.arange(B)).loss
    model.use_joint_batch()
    close(model(text, others, torch.arange(B)).loss, alone)
