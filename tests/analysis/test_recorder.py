"""Forwards are seen through every wrapper, and nothing about them changes."""

import copy

import pytest
import torch
import torch.distributed as dist
from op_recorder import Recorder as Ops
from tiers import slow_but
from tiny_fusion import CLASSES, SETTINGS, make_bert, make_fusion, make_images, make_text
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mope_fast import MoPEConfig, MoPEFusion, MultiAdapter, PromptedEncoder, PromptTuned, analysis

LABELS = torch.arange(4) % CLASSES


def inputs():
    torch.manual_seed(5)
    return make_text(4), make_images(4)


def expected(outputs, labels=None):
    recorder = analysis.Recorder(class_names=[str(c) for c in range(CLASSES)])
    for output in outputs:
        recorder.update(output.scores, labels)
    return recorder.tensors()


def assert_same(recorder, measures):
    assert recorder.tensors().keys() == measures.keys()
    for name, value in recorder.tensors().items():
        torch.testing.assert_close(value, measures[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_scores_and_labels_of_each_forward_are_counted():
    model = make_fusion()
    with analysis.record(model) as recorder:
        outputs = [model(*inputs(), LABELS), model(*inputs(), labels=LABELS)]
    assert (recorder.steps, recorder.training_steps, recorder.samples) == (2, 0, 8)
    assert_same(recorder, expected(outputs, LABELS))
    model(*inputs(), LABELS)
    assert recorder.steps == 2


def test_hooks_are_gone_after_the_block_and_after_an_exception():
    model = make_fusion()
    with analysis.record(model):
        assert hooks(model) == 1
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), analysis.record(model):
        1 / 0  # noqa: B018
    assert hooks(model) == 0


def test_a_copy_made_in_the_block_is_not_recorded():
    model = make_fusion()
    with analysis.record(model) as recorder:
        model(*inputs())
        twin = copy.deepcopy(model)
        twin(*inputs())
    twin(*inputs())
    assert recorder.steps == 1


def test_two_recorders_of_one_model_and_a_recorder_used_again():
    model = make_fusion()
    with analysis.record(model) as outer:
        first = model(*inputs())
        with analysis.record(model) as inner:
            second = model(*inputs())
            with pytest.raises(RuntimeError, match="already recording"), inner:
                pass
        assert hooks(model) == 1
    with inner:
        third = model(*inputs())
    assert_same(outer, expected([first, second]))
    assert_same(inner, expected([second, third]))


def test_notes_hold_for_one_forward_and_go_before_the_models_labels():
    model = make_fusion()
    with analysis.record(model, class_names=["even", "odd"], top=4) as recorder:
        recorder.note(ids=[40, 41, 42, 43], labels=torch.arange(4) % 2)
        model(*inputs(), LABELS)
        with pytest.raises(ValueError, match="class_names has 2 names, but the model has 5 classes"):
            model(*inputs(), LABELS)
        recorder.note(labels=[0, 0, 0, 0])
        model(*inputs())
    assert recorder.class_counts.tolist() == [6, 2]
    # the second pass has the same scores as the first: equal ones keep the order in which they came
    assert {sample.id for sample in recorder.top_samples(0, 0)} <= {40, 41, 42, 43, 4, 5, 6, 7}


def test_training_is_bitwise_what_it_is_without():
    torch.manual_seed(0)
    model = make_fusion(dropout=0.1, noise_std=0.1).float().train()
    grads = []
    for record in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(1)
        recorder = analysis.record(twin, every=2)
        if record:
            recorder.__enter__()
        for _ in range(3):
            text, images = make_text(4), make_images(4).float()
            optimizer.zero_grad()
            twin(text, images, LABELS).loss.backward()
            optimizer.step()
        if record:
            recorder.__exit__(None, None, None)
            assert recorder.training_steps == 3
            assert recorder.samples == 8
        grads.append([p.grad for p in twin.parameters() if p.grad is not None] + list(twin.state_dict().values()))
    assert len(grads[0]) == len(grads[1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inference_mode_autocast_and_training_into_one_recorder():
    model = make_fusion().float()
    text, images = inputs()
    with analysis.record(model) as recorder:
        with torch.inference_mode():
            first = model(text, images.float(), LABELS).scores.clone()
        with torch.autocast("cpu", torch.bfloat16):
            second = model(text, images.float(), LABELS.clone()).scores
        model.train()(text, images.float(), LABELS).loss.backward()
    assert (recorder.steps, recorder.training_steps) == (3, 1)
    own = analysis.Recorder()
    own.update(torch.cat([first, second.detach()], dim=1))
    assert own.samples == 8


def test_a_step_waits_for_nothing_and_memory_does_not_grow():
    def sizes():
        return {name: value.shape for name, value in vars(recorder._sums).items()}

    recorder = analysis.Recorder(class_names=["a", "b"], windows=4)
    recorder.update(torch.rand(2, 3, 4), torch.tensor([0, 1, 1]))
    before = sizes()
    with Ops() as ops:
        for _ in range(20):
            recorder.update(torch.rand(2, 3, 4), torch.tensor([0, 1, 1]), torch.tensor([7, 8, 9]))
    assert "add_" in ops.names
    assert not ops.waits()
    assert sizes() == before
    assert recorder.samples == 63


def small():
    """As little as there is to compile."""
    settings = {**SETTINGS, "use_static": False, "use_mapped": False}
    model = MoPEFusion(make_bert(num_hidden_layers=1), None, CLASSES, MoPEConfig(**settings, cross_dim=7)).double().eval()
    torch.manual_seed(5)
    return model, (make_text(4), torch.randn(4, 7, dtype=torch.float64), LABELS)


def test_on_a_gpu_no_value_is_asked_for():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # has no values to give
        recorder = analysis.Recorder(class_names=["a", "b", "c"], windows=4)
        for _ in range(9):
            recorder.update(torch.empty(2, 3, 4, device="cuda"), torch.empty(3, dtype=torch.long, device="cuda"))
            recorder.update(torch.empty(2, 3, 4, device="cuda"), torch.empty(3, 3), torch.empty(3, dtype=torch.long))
        assert recorder._sums.top_ids.device.type == recorder._sums.classes.device.type == "cuda"


@pytest.mark.parametrize(
    ("order", "backend"),
    slow_but(
        [("recorded first", "aot_eager")],
        [("recorded first", "aot_eager"), ("compiled first", "eager"), ("compiled in place", "eager")],
    ),
)
def test_compiled_models_are_recorded_without_compiling_again(order, backend):
    torch._dynamo.reset()
    model, batch = small()
    if order == "compiled in place":
        model.compile(backend=backend, fullgraph=True)
    compiled = model if order == "compiled in place" else torch.compile(model, backend=backend, fullgraph=True)
    if order != "recorded first":
        compiled(*batch)
    with analysis.record(model) as recorder, analysis.record(compiled) as other:
        outputs = [compiled(*batch)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs.append(compiled(*batch))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*batch)
    assert recorder.steps == other.steps == 2
    assert_same(recorder, expected(outputs, LABELS))
    assert_same(other, expected(outputs, LABELS))


@pytest.mark.slow
def test_a_larger_compiled_function_gives_its_scores_by_hand():
    torch._dynamo.reset()
    model, batch = small()

    @torch.compile(backend="eager", fullgraph=True)
    def step(*batch):
        output = model(*batch)
        return output.loss, output.scores

    with analysis.record(model), pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        step(*batch)
    own = analysis.Recorder(class_names=[str(c) for c in range(CLASSES)])
    own.update(step(*batch)[1], LABELS)
    assert_same(own, expected([model(*batch)], LABELS))


@pytest.mark.parametrize("wrapped", ["ddp", "static ddp", "compiled ddp", pytest.param("ddp of compiled", marks=pytest.mark.slow)])
def test_data_parallel_models_are_recorded(process_group, wrapped):
    torch._dynamo.reset()
    model, batch = small()
    inner = torch.compile(model, backend="eager") if wrapped == "ddp of compiled" else model
    wrapper = DistributedDataParallel(inner, static_graph=wrapped == "static ddp")
    wrapper = torch.compile(wrapper, backend="eager") if wrapped == "compiled ddp" else wrapper
    outputs = []
    with analysis.record(model) as recorder, analysis.record(wrapper) as other:
        for _ in range(2):
            outputs.append(wrapper(*batch))
            outputs[-1].loss.backward()
    assert_same(recorder, expected(outputs, LABELS))
    assert_same(other, expected(outputs, LABELS))


def test_gathered_by_one_process_it_is_the_same_but_for_positions(process_group):
    model, batch = small()
    with analysis.record(model) as recorder:
        recorder.note(ids=[4, 3, 2, 1])
        model(*batch)
        assert_same(recorder.gather(), recorder.tensors())
        model(*batch)
    gathered = recorder.gather()
    assert gathered.top_samples(0, 0) == []
    assert recorder.top_samples(0, 0) != []
    torch.testing.assert_close(gathered.importance, recorder.importance, rtol=0, atol=0)


def test_a_module_of_ones_own_is_recorded_in_its_model():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = make_fusion()

        def forward(self, text, images):
            return self.fusion(text, images).logits.softmax(-1)

    task = Task()
    with analysis.record(task) as recorder:
        task(*inputs())
    assert recorder.model is task.fusion
    assert recorder.samples == 4


def test_a_folded_model_is_recorded():
    model = make_fusion()
    folded = model.fold()
    with analysis.record(folded) as recorder:
        recorder.note(labels=LABELS)
        folded(*inputs())
    with analysis.record(model) as exact:
        model(*inputs(), LABELS)
    for name, value in exact.tensors().items():
        if not name.endswith("ids"):
            torch.testing.assert_close(recorder.tensors()[name], value, rtol=1e-8, atol=1e-8, equal_nan=True)


def test_members_of_a_multi_adapter_are_recorded_on_their_own():
    encoder = PromptedEncoder(make_bert())

    def fusion(experts):
        settings = {**SETTINGS, "num_experts": experts}
        return MoPEFusion(encoder, None, 3, MoPEConfig(**settings, cross_dim=7)).double().eval()

    members = {"a": fusion(4), "plain": PromptTuned(encoder, 2, 3).double().eval(), "b": fusion(6)}
    both = MultiAdapter(members)
    text, features = make_text(4), torch.randn(4, 7, dtype=torch.float64)
    with analysis.record(both, adapter="b") as recorder:
        both(text, ["b", "a", "plain", "b"], {"a": features, "b": features})
    with analysis.record(members["b"]) as alone:
        members["b"]({name: value[[0, 3]] for name, value in text.items()}, features[[0, 3]])
    assert (recorder.samples, recorder.not_routed) == (2, 2)
    torch.testing.assert_close(recorder.importance, alone.importance, rtol=1e-8, atol=1e-8)
    assert {sample.id for sample in recorder.top_samples(0, 5)} == {0, 3}
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got 'plain'"):
        analysis.record(both, adapter="plain")
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got None"):
        analysis.record(both)
    assert analysis.record(MultiAdapter({"only": members["a"]})).model is not None


@pytest.mark.parametrize(
    ("problem_type", "labels", "counts"),
    [
        ("multi_label_classification", (torch.arange(4)[:, None] >= torch.arange(CLASSES)).double(), [4, 3, 2, 1, 0]),
        ("regression", torch.zeros(4, CLASSES, dtype=torch.float64), None),
    ],
)
def test_labels_are_classes_by_the_problem(problem_type, labels, counts):
    model = make_fusion(problem_type=problem_type)
    with analysis.record(model) as recorder:
        model(*inputs(), labels)
    assert (None if recorder.class_counts is None else recorder.class_counts.tolist()) == counts


def test_one_class_a_pixel_is_no_class_of_the_sample():
    class Dense(nn.Module):
        def forward(self, features):
            return features[:, :3, None, None].expand(-1, -1, 2, 2)

    model = make_fusion(num_classes=None, head=Dense())
    with analysis.record(model) as recorder:
        model(*inputs(), torch.zeros(4, 2, 2, dtype=torch.long))
    assert recorder.samples == 4
    assert recorder.by_class is None


def test_a_note_before_a_forward_that_fails_is_not_taken_for_the_next_one():
    model = make_fusion()
    text, images = inputs()
    with analysis.record(model) as recorder:
        recorder.note(ids=[7, 7, 7, 7], labels=[0, 0, 0, 0])
        with pytest.raises(ValueError, match="differ in batch size"):
            model(text, images[:2])
        model(text, images, LABELS)
    assert recorder.class_counts.tolist() == torch.bincount(LABELS, minlength=CLASSES).tolist()
    assert {sample.id for sample in recorder.top_samples(0, 0)} == {0, 1, 2, 3}


def test_nothing_recorded_is_a_clear_error():
    with analysis.record(make_fusion()) as recorder:
        pass
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        recorder.report("never.html")
    with pytest.raises(RuntimeError, match="no model to observe"), analysis.Recorder():
        pass


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (lambda: "model", {}, TypeError, "model must be a MoPEFusion.* got str"),
        (lambda: nn.Linear(2, 2), {}, TypeError, "Linear contains no MoPEFusion.* no routing to record"),
        (lambda: nn.ModuleList([make_fusion(), make_fusion()]), {}, ValueError, "contains 2 models that may route"),
        (lambda: make_fusion(use_dynamic=False), {}, ValueError, "this MoPEFusion has no router"),
        (lambda: PromptTuned(make_bert(), 2, 3).fold(), {}, ValueError, "this FoldedModel has no router"),
        (make_fusion, {"adapter": "x"}, ValueError, "adapter='x' names a member .* is a MoPEFusion"),
        (make_fusion, {"top": 0}, ValueError, "top must be an integer >= 1, got 0"),
        (make_fusion, {"every": 0.5}, ValueError, "every must be an integer >= 1, got 0.5"),
        (make_fusion, {"class_names": "abc"}, TypeError, "class_names must be a sequence of strings"),
    ],
)
def test_what_can_not_be_recorded_is_refused(make, settings, error, message):
    with pytest.raises(error, match=message):
        analysis.record(make(), **settings)


def test_importing_the_package_does_not_import_analysis():
    import subprocess
    import sys

    program = "import sys, mope_fast; assert 'mope_fast.analysis' not in sys.modules; from mope_fast import analysis; "
    program += "assert not {'PIL', 'matplotlib', 'transformers', 'playwright'} & set(sys.modules); analysis.Recorder()"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
