import contextlib
import copy

import pytest
import torch
from op_recorder import Recorder
from tiny_fusion import CLASSES, DETERMINISTIC, close, make_bert, make_dinov2, make_fusion, make_images, make_text, trained

from mope_fast import analysis


def batch(size, tokens):
    return make_text(size, tokens), make_images(size), torch.randint(CLASSES, (size,))


@pytest.mark.parametrize(("main", "complementary"), [("bert", "dinov2"), ("dinov2", "bert")])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "mixing": "prompt", "dynamic_dropout": 0.1}])
def test_a_training_step_never_waits_for_the_host(main, complementary, settings):
    model = make_fusion(main, complementary, **settings).train()
    text, images, labels = batch(6, 9)
    inputs = (text, images) if main == "bert" else (images, text)
    with Recorder() as recorder:
        model(*inputs, labels).loss.backward()
    assert not recorder.waits()
    assert len(recorder.names) > 200


def test_the_recorder_sees_a_wait():
    with Recorder() as recorder:
        bool(torch.ones(()) > 0)
    assert "_local_scalar_dense" in recorder.names


def test_compiled_step_equals_eager_for_every_batch_size_without_recompiling():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make_fusion(make_bert(num_hidden_layers=1), make_dinov2(num_hidden_layers=1), **DETERMINISTIC).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = trained(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, tokens in ((6, 9), (9, 12), (13, 7)):
            inputs = batch(size, tokens)
            results = []
            for step in (model, compiled):
                output = step(*inputs)
                grads = torch.autograd.grad(output.loss, list(parameters.values()))
                results.append((output.logits, output.loss, output.scores, *grads))
            for name, expected, got in zip(["logits", "loss", "scores", *parameters], *results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_inference_compiles_too():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = make_fusion(make_dinov2(num_hidden_layers=1), None, cross_dim=20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images, features = make_images(6), torch.randn(6, 20, dtype=torch.float64)
    with torch.inference_mode():
        close(compiled(images, features).logits, model(images, features).logits)


@contextlib.contextmanager
def joint_batch(model, tmp_path):
    """Of one rank: the collective is there."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model.use_joint_batch()
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("within", ["nothing", "autocast", "recording", "a joint batch"])
def test_a_whole_training_step_on_the_gpu_never_waits(within, tmp_path):
    model = make_fusion().float().train().cuda()
    around = {"recording": lambda: analysis.record(model), "a joint batch": lambda: joint_batch(model, tmp_path)}
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3), fused=True)
    text, images, labels = batch(6, 9)
    text = {name: value.cuda() for name, value in text.items()}
    images, labels = images.float().cuda(), labels.cuda()

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=within == "autocast"):
            loss = model(text, images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with around.get(within, contextlib.nullcontext)():
        step()  # the first call compiles kernels and allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_training_step_replays_as_a_cuda_graph(checkpointing):
    torch.manual_seed(0)
    model = make_fusion(**DETERMINISTIC).float().train().cuda()
    twin = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    # Adam would make steps of full size out of the rounding of gradients that are zero
    optimizers = [torch.optim.SGD(m.parameter_groups(1e-2)) for m in (model, twin)]

    def on_gpu(seed):
        torch.manual_seed(seed)
        text, images, labels = batch(6, 9)
        return {name: value.cuda() for name, value in text.items()}, images.float().cuda(), labels.cuda()

    def step(model, optimizer, text, images, labels):
        optimizer.zero_grad(set_to_none=True)
        loss = model(text, images, labels).loss
        loss.backward()
        optimizer.step()
        return loss

    text, images, labels = static = on_gpu(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizers[0], *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(model, optimizers[0], *static)
    for _ in range(3):  # the warm-up; the capture itself runs nothing
        step(twin, optimizers[1], *static)
    for seed in (1, 2, 3):
        new_text, new_images, new_labels = on_gpu(seed)
        for name, value in new_text.items():
            text[name].copy_(value)
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        expected = step(twin, optimizers[1], new_text, new_images, new_labels)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
