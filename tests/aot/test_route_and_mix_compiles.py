"""Every launch-table entry of route_and_mix compiles for sm_80, sm_86 and sm_90, fits, and moves its data in wide words."""

import pytest
import torch
import triton
from compiler import Recorder, assert_fits, assert_wide_words, compile_launch, innermost_first, misaligned
from tiers import slow_but

pytestmark = pytest.mark.aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALLEST = (1, 1, 1, 1, FP32, {})
# (batch, experts, rows, width, dtype, settings): the branches of kernels/launch.py, and each constexpr of the kernels
CASES = [
    (64, 16, 6, 768, BF16, {}),
    (64, 16, 6, 768, FP32, {}),
    (64, 16, 6, 1536, BF16, {"gram": True}),
    (300, 16, 6, 768, FP16, {"noise": True}),
    (8192, 16, 6, 768, BF16, {}),
    (8192, 16, 6, 768, FP32, {"noise": True}),
    (8192, 256, 6, 1536, BF16, {"gram": True}),
    (8192, 64, 6, 768, FP32, {}),
    (8192, 256, 6, 768, FP32, {}),
    (64, 1024, 6, 768, BF16, {"gram": True, "top_k": 4}),
    (64, 1024, 6, 768, FP32, {"gram": True, "top_k": 4, "renormalize": True}),
    SMALLEST,
    (17, 7, 3, 34, BF16, {"gram": True, "noise": True, "top_k": 2}),
    (64, 16, 6, 768, FP32, {"out_dtype": BF16}),
]
KERNELS = ("mix_kernel", "mixture_grads_kernel", "router_grads_kernel")
COMMON = [CASES[0], CASES[1], CASES[2], CASES[4]]


@pytest.fixture
def record(monkeypatch):
    """A function that gives the launches of a forward and a backward."""
    from mope_fast.kernels import route_and_mix as kernels

    from mope_fast.ops import route_and_mix as ops

    launches = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))

    def run(batch, experts, rows, width, dtype, settings, view=lambda tensor: tensor):
        options = {"gram": False, "noise": False, "top_k": None, "renormalize": False, "out_dtype": dtype, **settings}
        logits = view(torch.empty(batch, experts))
        table = view(torch.empty(experts, rows, width, dtype=dtype))
        noise = view(torch.empty(batch, experts)) if options["noise"] else None
        gram = view(torch.empty(rows, experts, experts)) if options["gram"] else None
        common = (0.1, options["top_k"], options["renormalize"], 1e-5)
        mixed, scores, rstd = ops._triton_forward(logits, table, noise, gram, *common, options["out_dtype"])
        needs = [True, True, gram is not None]
        ops._triton_backward(view(mixed), view(scores), logits, table, noise, gram, scores, rstd, *common, needs)
        assert len(launches) == 3
        return list(launches)

    return run


@pytest.mark.parametrize(
    ("case", "capability"),
    slow_but(
        [(SMALLEST, 80), (COMMON[2], 86), *((case, 90) for case in CASES)],
        [(SMALLEST, 80), *((case, capability) for capability in (86, 90) for case in CASES)],
    ),
    ids=str,
)
def test_compiles_and_fits(case, capability, record):
    for launch in record(*case):
        assert_fits(compile_launch(launch, capability), capability)


@pytest.mark.parametrize("view", [misaligned, innermost_first])
def test_compiles_for_other_layouts(view, record):
    for launch in record(*CASES[2], view=view):
        assert_fits(compile_launch(launch, 90), 90)


# the gate walks the row once for each kept expert: rare, and a few bytes are spilled by Triton 3.6
@pytest.mark.parametrize("case", [case for case in CASES if "top_k" not in case[-1]], ids=str)
def test_spills_nothing_on_sm_90(case, record):
    for launch in record(*case):
        compiled = compile_launch(launch, 90)
        assert compiled.spills == 0, f"{compiled.name}: {compiled.spills} bytes of local memory"


def test_a_product_and_a_sum_are_one_instruction_whatever_tritons_default_is(record, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert "mul.rn" not in compile_launch(record(*CASES[1])[0], 90).ptx


@pytest.mark.parametrize("case", COMMON, ids=str)
def test_tables_and_results_move_in_words_of_16_bytes_on_sm_90(case, record):
    for launch in record(*case)[:2]:  # the router's gradients are few numbers
        assert_wide_words(compile_launch(launch, 90), narrow=(".b16", ".b8"))


LAYERS = [
    (8, 16, 6, 1536, BF16, True),
    (64, 16, 6, 1536, BF16, True),
    (512, 64, 6, 1536, BF16, True),
    (8, 256, 6, 768, FP32, False),
    (1, 4, 2, 128, BF16, False),
    (8, 1024, 2, 128, BF16, True),
]


@pytest.mark.parametrize(
    ("case", "capability"),
    slow_but(
        [(LAYERS[0], 80), (LAYERS[0], 120), (LAYERS[-1], 89), *((case, 90) for case in LAYERS)],
        [(case, capability) for capability in (80, 89, 90, 100, 120) for case in LAYERS],
    ),
    ids=str,
)
def test_a_whole_layer_is_three_launches_that_fit_and_on_sm_90_spill_nothing(case, capability, monkeypatch):
    """ViT-B's and smaller: feature, router, experts in K/V space or as prompts, static prompts before, mapped ones behind."""
    from mope_fast.kernels import route_and_mix as kernels

    from mope_fast.ops import layer_prompts as ops

    launches = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    batch, experts, rows, width, dtype, in_kv_space = case
    table = torch.empty(experts, rows, width, dtype=dtype)
    before, after = (table.new_empty(size, rows if size == 1 else 1, width) for size in (1, batch))
    gram = torch.empty(experts, rows, experts) if in_kv_space else None
    shift = table.new_empty(width) if in_kv_space else None
    router = (table.new_empty(batch, 197, 768)[:, 0], torch.empty(batch, experts), torch.empty(2, 768), torch.empty(2, experts))
    tensors = (*router, table, before, after, gram, shift)
    mixed, *saved = ops._triton_forward(*tensors, None, False, 1e-5, dtype)
    needs = [tensor is not None for tensor in tensors]
    ops._triton_backward(torch.empty_like(mixed), saved[0], *tensors, *saved, None, False, 1e-5, needs)
    assert len(launches) == 3
    for launch in launches:
        compiled = compile_launch(launch, capability)
        assert_fits(compiled, capability)
        if capability == 90 and experts <= 512:  # more are rare: they run, and spill
            allowed = 176 if experts > 16 and triton.__version__.startswith("3.6.") else 0
            assert compiled.spills <= allowed, f"{compiled.name}: {compiled.spills} bytes of local memory"
