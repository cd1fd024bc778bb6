"""Many models on one encoder in one pass: each sample gets what its own model alone would give it."""

import pytest
import torch
from op_recorder import Recorder
from tiny_fusion import INPUTS, MAKE, SETTINGS, close, make_bert, make_dinov2, make_images, make_text

from mope_fast import MoPEConfig, MoPEFusion, MultiAdapter, PromptedEncoder, PromptTuned, _implementations

CROSS = 20


def fusion(classes=3, **settings):
    return lambda encoder: MoPEFusion(encoder, None, classes, MoPEConfig(**{**SETTINGS, **settings}, cross_dim=CROSS))


def tuned(length, classes=3):
    return lambda encoder: PromptTuned(encoder, length, classes)


MIXES = {
    "alike": [fusion(), fusion(), fusion()],
    "experts and temperatures differ": [fusion(), fusion(2, num_experts=7, temperature=0.3), fusion(num_experts=1)],
    "lengths differ": [fusion(), fusion(4, prompt_length=5), tuned(4), tuned(0, 2)],
    "heads read different parts": [fusion(), fusion(head_inputs="main"), fusion(4, use_dynamic=False)],
    "parts differ": [fusion(use_dynamic=False), fusion(use_mapped=False), fusion(use_static=False)],
    "gated": [fusion(top_k=2, renormalize=True), fusion(top_k=2, renormalize=True, num_experts=2), tuned(3)],
    "prompts of one length": [tuned(3), tuned(3, 5)],
    "one": [fusion()],
    "mapped alone": [fusion(use_static=False, use_dynamic=False), fusion(use_static=False, use_dynamic=False)],
    "no head": [fusion(None), tuned(2, 4)],
    "no prompts": [tuned(0), tuned(0, 2)],
}


def build(name, makers):
    shared = PromptedEncoder(MAKE[name]())
    return {f"task{i}": make(shared).double().eval() for i, make in enumerate(makers)}


def features_for(models, batch):
    needs = [name for name, model in models.items() if isinstance(model, MoPEFusion) and model.config.uses_cross]
    return {name: torch.randn(batch, CROSS, dtype=torch.float64) for name in needs}


@pytest.mark.parametrize("encoder", list(MAKE))
@pytest.mark.parametrize("mix", list(MIXES))
def test_one_pass_equals_running_each_alone(encoder, mix):
    models = build(encoder, MIXES[mix])
    multi = MultiAdapter(models)
    batch = 9
    inputs, features = INPUTS[encoder](batch), features_for(models, batch)
    names = [list(models)[i] for i in torch.randint(len(models), (batch,))]
    together = multi(inputs, names, features)
    by_index = multi(inputs, torch.tensor([multi.names.index(name) for name in names]), features)
    first = 0
    for name, model in models.items():
        alone = model(inputs, features[name]) if name in features else model(inputs)
        own = torch.tensor([i for i, n in enumerate(names) if n == name], dtype=torch.long)
        close(together.features[own], alone.features[own])
        assert torch.equal(by_index.features[own], together.features[own])
        if alone.logits is not None:
            classes = alone.logits.shape[1]
            close(together.logits[own, :classes], alone.logits[own])
            assert (together.logits[own, classes:] == float("-inf")).all()
        elif together.logits is not None:
            assert (together.logits[own] == float("-inf")).all()
        if alone.scores is not None:
            experts = alone.scores.shape[2]
            close(together.scores[:, own, first : first + experts], alone.scores[:, own])
            assert together.scores[:, own].count_nonzero() <= experts * len(own) * len(together.scores)
            first += experts


def test_what_stands_at_other_adapters_samples_does_not_matter():
    models = build("bert", MIXES["lengths differ"])
    multi, text = MultiAdapter(models), make_text(4)
    features = features_for(models, 4)
    names = ["task0", "task1", "task2", "task0"]
    expected = multi(text, names, features).logits
    for name, rows in features.items():
        rows[[i for i, n in enumerate(names) if n != name]] = float("nan")
    assert torch.equal(multi(text, names, features).logits, expected)


def test_adapters_of_which_no_sample_is_in_the_batch_need_no_inputs():
    models = build("bert", MIXES["lengths differ"])
    multi, text = MultiAdapter(models), make_text(3)
    close(multi(text, ["task2"] * 3).features, models["task2"](text).features)
    features = features_for(models, 3)
    close(multi(text, ["task1"] * 3, {"task1": features["task1"]}).features, models["task1"](text, features["task1"]).features)


def test_complementary_encoders_run_for_their_adapters():
    shared = PromptedEncoder(make_bert())
    vision = MoPEFusion(shared, make_dinov2(), 3, MoPEConfig(**SETTINGS)).double().eval()
    models = {"vision": vision, "text": PromptTuned(shared, 3, 3).double().eval()}
    text, images = make_text(4), make_images(4)
    output = MultiAdapter(models)(text, ["vision", "text", "text", "vision"], {"vision": images})
    close(output.logits[[0, 3]], vision(text, images).logits[[0, 3]])
    close(output.logits[[1, 2]], models["text"](text).logits[[1, 2]])


def test_no_wait_for_the_host_with_indices(monkeypatch):
    # SDPA's path looks at masks, on a CPU only
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "reference")
    models = build("bert", MIXES["lengths differ"])
    multi, text, features = MultiAdapter(models), make_text(4), features_for(models, 4)
    ids = torch.tensor([0, 1, 2, 3])
    with Recorder() as recorder, torch.no_grad():
        multi(text, ids, features)
    assert not recorder.waits()


def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    models = build("bert", MIXES["lengths differ"])
    multi, text, features = MultiAdapter(models), make_text(4), features_for(models, 4)
    ids = torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(multi, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(text, ids, features).logits, multi(text, ids, features).logits)


def test_the_models_go_on_as_they_were():
    models = build("bert", MIXES["alike"])
    text, features = make_text(4), features_for(models, 4)
    before = models["task1"](text, features["task1"]).logits
    MultiAdapter(models)(text, ["task0", "task1", "task2", "task0"], features)
    assert torch.equal(models["task1"](text, features["task1"]).logits, before)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda e: {}, ValueError, "adapters is empty"),
        (
            lambda e: {"a": PromptTuned(e, 2), "b": PromptTuned(make_bert(), 2)},
            ValueError,
            "'b' runs another encoder object than 'a'",
        ),
        (lambda e: {"a": fusion(top_k=2)(e), "b": fusion()(e)}, ValueError, "gate their scores differently"),
    ],
)
def test_what_can_not_run_together_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        MultiAdapter(make(PromptedEncoder(make_bert())))


@pytest.mark.parametrize(
    ("adapters", "features", "error", "message"),
    [
        (["task0", "other", "task0"], {}, ValueError, r"unknown adapters \['other'\]: expected names out of \['task0', 'task1'\]"),
        (["task1", "task1"], {}, ValueError, r"one adapter for each of 3 samples, got \(2,\)"),
        (torch.zeros(3), {}, TypeError, "names or indices of dtype int64, got torch.float32"),
        (["task0"] * 3, {}, ValueError, "adapter 'task0' depends on a complementary modality"),
        (["task0"] * 3, {"x": torch.zeros(3, CROSS)}, ValueError, r"complementary_inputs for unknown adapters \['x'\]"),
        (["task0"] * 3, {"task0": torch.zeros(2, CROSS)}, ValueError, "main has 3 samples, complementary has 2"),
        (["task0"] * 3, {"task0": torch.zeros(3, 7)}, ValueError, r"cross must be \(B, 20\), got \(3, 7\)"),
    ],
)
def test_wrong_inputs_are_named(adapters, features, error, message):
    multi = MultiAdapter(build("bert", [fusion(), tuned(3)]))
    with pytest.raises(error, match=message):
        multi(make_text(3), adapters, features)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([1], "adapters must be a dict of names and MoPEFusion, PromptTuned or folded models"),
        ({"a": torch.nn.Linear(2, 2)}, "adapters must be a dict of names and MoPEFusion, PromptTuned or folded models"),
    ],
)
def test_what_is_no_adapter_is_named(adapters, message):
    with pytest.raises(TypeError, match=message):
        MultiAdapter(adapters)


@pytest.mark.parametrize("adapters", ["task0", [0, 1, 2]])
def test_what_is_no_list_of_names_is_named(adapters):
    multi = MultiAdapter(build("bert", [tuned(3), tuned(3)]))
    with pytest.raises(TypeError, match="adapters must be a sequence of names, one for each sample, or a tensor of indices, got"):
        multi(make_text(3), adapters)


def test_a_folded_model_that_was_given_stays_usable():
    models = build("bert", [fusion(), tuned(3)])
    folded, text, features = models["task0"].fold(), make_text(4), torch.randn(4, CROSS, dtype=torch.float64)
    expected = folded(text, features).logits
    multi = MultiAdapter({"task0": folded, "task1": models["task1"]})
    close(multi(text, ["task0"] * 4, {"task0": features}).logits, expected)
    assert torch.equal(folded(text, features).logits, expected)


def test_an_adapter_whose_numbers_would_reach_the_others_samples_is_refused():
    models = build("bert", [fusion(), fusion()])
    with torch.no_grad():
        models["task1"].bank.stacks["32"].experts[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter 'task1' has numbers that are not finite.*tables.0.experts"):
        MultiAdapter(models)
