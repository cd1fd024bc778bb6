"""Who runs in an encoder: threads, interrupts, forks, forwards within forwards; and models that nobody holds any more."""

import copy
import gc
import os
import pickle
import signal
import threading
import time

import pytest
import timm
import torch
from at_the_same_time import in_threads
from interrupts import interrupt
from tiny_fusion import SETTINGS, close, make_bert, make_dinov2, make_fusion, make_images, make_text

import mope_fast
from mope_fast import MoPEConfig, MoPEFusion, PromptedEncoder, PromptTuned, unwrap_encoder
from mope_fast.encoders import attachment


@pytest.fixture
def served():
    """A fusion, the inputs of four requests, and what each gives alone."""
    model = make_fusion(make_bert(), None, cross_dim=20)
    requests = [(make_text(3), torch.randn(3, 20, dtype=torch.float64)) for _ in range(4)]
    return model, requests, [model(*request).logits for request in requests]


def pausing(module, seconds=0.02):
    """Hands the interpreter to other threads whenever the module is called."""
    return module.register_forward_pre_hook(lambda *args: None if torch.compiler.is_dynamo_compiling() else time.sleep(seconds))


def test_threads_that_share_a_model_each_get_their_own_result(served):
    model, requests, expected = served
    hooks = [pausing(model.main.encoder.embeddings), pausing(model.main.encoder.encoder.layer[1])]
    got = in_threads(*(lambda request=request: model(*request).logits for request in requests))
    for hook in hooks:
        hook.remove()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_two_models_on_one_encoder_take_turns():
    shared, text = PromptedEncoder(make_bert()), make_text(3)
    first, second = PromptTuned(shared, 2).double().eval(), PromptTuned(shared, 5).double().eval()
    expected = first(text).features, second(text).features
    pausing(shared.encoder.encoder.layer[1])
    got = in_threads(lambda: first(text).features, lambda: second(text).features)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_the_encoder_alone_in_another_thread_runs_without_prompts(served):
    model, requests, expected = served
    text = requests[0][0]
    alone = model.main.encoder(**text).last_hidden_state
    got = []

    def meanwhile(module, args):
        if not got:
            got.append(None)
            got[0] = in_threads(lambda: model.main.encoder(**text).last_hidden_state)[0]

    model.main.encoder.encoder.layer[1].register_forward_pre_hook(meanwhile)
    assert torch.equal(model(*requests[0]).logits, expected[0])
    assert torch.equal(got[0], alone)


def test_a_backward_that_computes_layers_again_beside_a_forward_keeps_its_own_prompts(served):
    model, requests, expected = served
    model.gradient_checkpointing_enable()

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), list(model.bank.parameters()))

    wanted = gradients(model(*requests[0]).logits)
    logits = model(*requests[0]).logits
    forwards = []

    def meanwhile(module, args):
        # between this layer's prompts and its attention, in the thread of the backward
        if threading.current_thread() is not threading.main_thread() and not forwards:
            forwards.append(None)
            forwards[0] = in_threads(lambda: model(*requests[1]).logits)[0]

    model.main.encoder.encoder.layer[1].attention.self.query.register_forward_pre_hook(meanwhile)
    got = in_threads(lambda: gradients(logits))[0]
    assert torch.equal(forwards[0], expected[1])
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["encoder", "first layer", "second layer"])
def test_a_forward_within_a_forward_of_the_same_model_is_an_error(served, where):
    model, requests, expected = served
    encoder = model.main.encoder
    module = {"encoder": encoder, "first layer": encoder.encoder.layer[0], "second layer": encoder.encoder.layer[1]}[where]
    hook = module.register_forward_pre_hook(lambda *args: model(*requests[1]))
    with pytest.raises(RuntimeError, match="was called again from within its own forward"):
        model(*requests[0])
    hook.remove()
    assert torch.equal(model(*requests[0]).logits, expected[0])


@pytest.mark.parametrize("layer", [0, 1])
def test_the_encoder_alone_within_a_forward_of_the_same_thread_is_an_error(served, layer):
    model, requests, expected = served
    calls = []

    def again(*args):
        if not calls:
            calls.append(True)
            model.main.encoder(**requests[0][0])

    hook = model.main.encoder.encoder.layer[layer].register_forward_pre_hook(again)
    with pytest.raises(RuntimeError, match="by another forward within this one"):
        model(*requests[0])
    hook.remove()
    assert torch.equal(model(*requests[0]).logits, expected[0])


def test_a_layer_that_takes_no_prompts_is_an_error(served):
    model, requests, expected = served
    stack = model.main.encoder.encoder
    ours, layers = stack.layer[1].forward, stack.layer
    stack.layer[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match="1 of 2 layers of this BertModel took their prompts"):
        model(*requests[0])
    stack.layer[1].forward = ours
    stack.layer = layers[:1]
    with pytest.raises(RuntimeError, match="this BertModel has 1 layers now, and had 2 when it was wrapped"):
        model(*requests[0])
    stack.layer = layers
    assert torch.equal(model(*requests[0]).logits, expected[0])


def public_state(encoder):
    flags = [p.requires_grad for p in encoder.parameters()]
    return flags, [m.training for m in encoder.modules()], [set(vars(m)) for m in encoder.modules()]


def test_an_interrupt_at_any_moment_leaves_a_model_that_works(served):
    model, requests, expected = served
    event = 1
    while interrupt(lambda: model(*requests[0]), event, "encoders") >= event:
        assert torch.equal(model(*requests[1]).logits, expected[1]), event
        assert torch.equal(in_threads(lambda: model(*requests[2]).logits)[0], expected[2]), event
        event += 5  # of some 160
    assert event > 100


def test_an_interrupt_while_an_encoder_is_wrapped_leaves_one_that_can_be():
    text, event = make_text(3), 1
    while True:
        encoder = make_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        state, alone = public_state(encoder), encoder(**text).last_hidden_state
        if interrupt(lambda: PromptedEncoder(encoder), event, "encoders") < event:  # noqa: B023
            break
        model = make_fusion(encoder, None, cross_dim=20)
        model(text, torch.randn(3, 20, dtype=torch.float64))
        model.unwrap()
        assert public_state(encoder) == state
        close(encoder(**text).last_hidden_state, alone)
        event += 5  # of some 860
    assert event > 400


def test_an_interrupt_while_a_timm_model_is_wrapped_leaves_its_own_attention():
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=3)
    event = 1
    while True:
        encoder = copy.deepcopy(own)
        if interrupt(lambda: PromptedEncoder(encoder), event, "encoders") < event:  # noqa: B023
            break
        PromptTuned(encoder, 2).unwrap()
        assert public_state(encoder) == public_state(own), event
        assert [type(part) for part in encoder.modules()] == [type(part) for part in own.modules()], event
        event += 7
    assert event > 400


@pytest.mark.parametrize("kind", ["bert", "vit", "swin"])
def test_an_interrupt_while_an_encoder_is_given_back_leaves_the_rest_to_be_done(kind):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_classes": 0}
    if kind == "vit":
        encoder = timm.models.VisionTransformer(**sizes, depth=2, num_heads=2).train()
    elif kind == "swin":
        encoder = timm.models.SwinTransformer(**sizes, depths=(1, 1), num_heads=(2, 2), window_size=2).train()
    else:
        encoder = make_bert().train()
    parts, state = list(encoder.modules()), public_state(encoder)
    event, interrupted = 1, True
    while interrupted:
        model = make_fusion(encoder, None, cross_dim=20)
        interrupted = interrupt(model.unwrap, event) >= event
        unwrap_encoder(encoder)
        assert public_state(encoder) == state, event
        assert list(encoder.modules()) == parts, event
        event += 7  # of some 80 to 200
    assert event > 50


COPIES = []


def copy_now(module, args, output):
    if len(COPIES) == 1:
        (model,) = COPIES
        COPIES.extend([None, None])
        COPIES[1:] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def test_copies_and_pickles_made_in_the_middle_of_a_forward_start_free(served):
    model, requests, expected = served
    COPIES[:] = [model]
    model.main.encoder.encoder.layer[1].register_forward_hook(copy_now)
    assert torch.equal(model(*requests[0]).logits, expected[0])
    _, *twins = COPIES
    got = in_threads(*(lambda twin=twin: twin(*requests[0]).logits for twin in twins))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # that is what is tried here
def test_a_process_forked_in_the_middle_of_another_threads_forward_can_run_the_model(served):
    model, requests, expected = served
    inside, go_on = threading.Event(), threading.Event()

    def hold(*args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(60)

    model.main.encoder.encoder.layer[1].register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: model(*requests[0]))
    thread.start()
    inside.wait(60)
    if (child := os.fork()) == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(model(*requests[1]).logits, expected[1]) else 1)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_signal_handler_that_runs_the_model_in_the_middle_of_a_forward_gets_an_error(served):
    model, requests, expected = served
    errors = []

    def handler(*args):
        try:
            model(*requests[1])
        except RuntimeError as error:
            errors.append(str(error))

    previous = signal.signal(signal.SIGINT, handler)
    hook = model.main.encoder.encoder.layer[1].register_forward_pre_hook(lambda *args: signal.raise_signal(signal.SIGINT))
    try:
        assert torch.equal(model(*requests[0]).logits, expected[0])
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, previous)
    assert len(errors) == 1
    assert "called again from within" in errors[0]


def test_eager_and_compiled_threads_do_not_disturb_each_other(served):
    model, requests, expected = served
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pausing(model.main.encoder.encoder.layer[1].attention, 0.001)

    def many(run, index):
        return [run(*requests[index]).logits for _ in range(5)]

    # one traces while the others run
    got = in_threads(
        lambda: many(model, 0), lambda: many(compiled, 1), lambda: many(model, 2), lambda: many(compiled, 3)
    )  # fmt: skip
    for results, wanted in zip(got, expected, strict=True):
        for result in results:
            close(result, wanted)


def test_forwards_of_a_broken_graph_that_meet_are_errors(served):
    model, requests, expected = served
    moments = {"first began": threading.Event(), "second began": threading.Event(), "first ended": threading.Event()}
    tell = {"first": ("first began", "second began"), "second": ("second began", "first ended")}

    @torch._dynamo.disable
    def meet(*args):
        if (name := threading.current_thread().name) in tell:
            began, wanted = tell[name]
            moments[began].set()
            moments[wanted].wait(60)

    model.main.encoder.embeddings.register_forward_hook(meet)
    compiled = torch.compile(model, backend="eager")
    close(compiled(*requests[0]).logits, expected[0])

    def run(name, request, after):
        threading.current_thread().name = name
        if after:
            moments[after].wait(60)
        try:
            return compiled(*request).logits
        finally:
            moments["first ended"].set()

    got = in_threads(lambda: run("first", requests[0], None), lambda: run("second", requests[1], "first began"))
    assert [type(error) for error in got] == [RuntimeError, RuntimeError]
    close(compiled(*requests[2]).logits, expected[2])


def test_unwrap_waits_for_a_forward_of_another_thread():
    encoder = make_bert(hidden_dropout_prob=0.5).train()
    model, text, cross = make_fusion(encoder, None, cross_dim=20), make_text(3), torch.randn(3, 20, dtype=torch.float64)
    expected, inside = model(text, cross).logits, threading.Event()

    def hold(*args):
        inside.set()
        time.sleep(0.05)

    hook = encoder.encoder.layer[1].attention.register_forward_pre_hook(hold)
    got, _ = in_threads(lambda: model(text, cross).logits, lambda: inside.wait(60) and model.unwrap())
    hook.remove()
    assert torch.equal(got, expected)
    assert encoder.encoder.layer[1].output.dropout.training


# who owns an encoder


def test_of_threads_that_wrap_one_encoder_one_has_it(monkeypatch):
    encoder, freeze = make_bert(), attachment.freeze
    monkeypatch.setattr(attachment, "freeze", lambda module: (time.sleep(0.02), freeze(module))[1])
    got = in_threads(*[lambda: PromptedEncoder(encoder)] * 3)
    assert sorted(type(each).__name__ for each in got) == ["PromptedEncoder", "ValueError", "ValueError"]


def test_an_encoder_whose_model_was_dropped_can_be_wrapped_again_and_is_given_back_whole():
    encoder = make_bert().train()
    encoder.pooler.requires_grad_(False)
    state, text = public_state(encoder), make_text(3)
    model = make_fusion(encoder, None, cross_dim=20)
    del model
    again = make_fusion(encoder, None, cross_dim=20)
    again(text, torch.randn(3, 20, dtype=torch.float64))
    assert again.unwrap()[0] is encoder
    assert public_state(encoder) == state


def test_a_dropped_model_that_waits_for_the_garbage_collector_does_not_hold_its_encoder():
    encoder = make_bert()
    gc.disable()
    try:
        model = make_fusion(encoder, None, cross_dim=20)
        model.itself = [model]  # as a traceback or a trainer's callback makes it
        del model
        make_fusion(encoder, None, cross_dim=20)
    finally:
        gc.enable()


def test_a_notebook_cell_that_runs_twice_has_a_way_on():
    encoder, other = make_bert(), make_dinov2()
    state = public_state(encoder)
    model = make_fusion(encoder, other)
    with pytest.raises(ValueError, match=r"restore it with mope_fast.unwrap_encoder\(encoder\)"):
        make_fusion(encoder, other)
    assert unwrap_encoder(encoder) is encoder
    assert public_state(encoder) == state
    unwrap_encoder(other)
    again, inputs = make_fusion(encoder, other), (make_text(3), make_images(3))
    expected = again(*inputs).logits
    with pytest.raises(RuntimeError, match="was unwrapped and its encoder was restored"):
        model(*inputs)
    model.unwrap()
    del model
    gc.collect()
    assert torch.equal(again(*inputs).logits, expected)
    unwrap_encoder(unwrap_encoder(encoder))
    with pytest.raises(TypeError, match=r"expects an encoder \(a torch.nn.Module\), got str"):
        unwrap_encoder("bert")


@pytest.mark.parametrize("make", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
@pytest.mark.parametrize("way", ["wrapped", "given back"])
def test_a_copy_of_a_wrapped_encoder_alone_is_free(make, way):
    encoder, text, cross = make_bert().train(), make_text(3), torch.randn(3, 20, dtype=torch.float64)
    state = public_state(encoder)
    model = make_fusion(encoder, None, cross_dim=20)
    expected, trained = model(text, cross).logits, model.trained_state_dict()
    alone = encoder(**text).last_hidden_state
    twin = make(encoder)
    with torch.no_grad():
        encoder.encoder.layer[1].output.dense.weight.zero_()  # the copy runs its own layers
    assert torch.equal(twin(**text).last_hidden_state, alone)
    if way == "given back":
        assert public_state(unwrap_encoder(twin)) == state
    again = MoPEFusion(twin, None, 5, MoPEConfig(**SETTINGS, cross_dim=20)).double().eval()
    again.load_state_dict(trained, strict=False)
    assert torch.equal(again(text, cross).logits, expected)
    again.unwrap()
    assert public_state(twin) == state


def test_the_way_back_is_public():
    assert mope_fast.unwrap_encoder is unwrap_encoder


def make_black_box():
    box = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Dropout(0.5)).double().train()
    box[0].bias.requires_grad_(False)
    return box


def test_a_black_box_thaws_when_the_last_model_lets_go_in_any_order():
    box = make_black_box()
    state = public_state(box)
    first, second = (make_fusion("bert", box, cross_dim=20) for _ in range(2))
    twin = copy.deepcopy(first)
    first.unwrap()
    assert not any(parameter.requires_grad for parameter in box.parameters())
    first.unwrap()
    second.unwrap()
    assert public_state(box) == state
    copied = twin.complementary
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    twin.unwrap()
    assert public_state(copied) == state


@pytest.mark.parametrize("way", ["next model", "unwrap_encoder"])
def test_a_black_box_whose_model_was_dropped_is_given_back_as_it_was(way):
    box = make_black_box()
    state = public_state(box)
    model = make_fusion("bert", box, cross_dim=20)
    del model
    gc.collect()
    if way == "next model":
        make_fusion("bert", box, cross_dim=20).unwrap()
    else:
        unwrap_encoder(box)
    assert public_state(box) == state
