import subprocess
import sys

HIDE_TRITON = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
sys.meta_path.insert(0, Hidden())
"""


def run(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_loads_no_optional_package_and_touches_no_gpu():
    program = """
import sys, mope_fast, mope_fast.data, torch
print(*({"transformers", "timm", "xformers", "sklearn", "PIL", "mope_fast.kernels", "mope_fast.kernels.launch"} & set(sys.modules)))
assert not torch.cuda.is_initialized()
assert set(mope_fast.__all__) <= set(dir(mope_fast))
assert {"bert", "dinov2"} <= set(mope_fast.supported_encoders())
"""
    assert run(program) == []


def test_import_brings_nothing_heavy_beyond_torch():
    program = """
import sys, torch
before = set(sys.modules)
import mope_fast, mope_fast.data, mope_fast.info
heavy = {
    "torch._dynamo", "torch._export", "torch._functorch.aot_autograd", "torch._inductor", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx",
    "torch.testing", "torch.utils.data", "torch.utils.tensorboard",
    "PIL", "accelerate", "lightning", "matplotlib", "onnx", "pandas", "scipy", "sklearn", "sympy", "timm", "torchvision",
    "tqdm", "transformers", "triton", "xformers",
}
print(*sorted(heavy & (set(sys.modules) - before)))
"""
    assert run(program) == []


def test_without_triton_everything_but_its_kernels_works():
    program = (
        HIDE_TRITON
        + """
import torch, mope_fast
mixed, scores = mope_fast.functional.route_and_mix(torch.zeros(2, 3), torch.ones(3, 4, 5))
assert torch.allclose(mixed, torch.ones(2, 4, 5)) and torch.allclose(scores, torch.full((2, 3), 1 / 3))
layer = mope_fast.MoPELayer(8, 6)
layer(torch.randn(2, 3, 8), torch.randn(2, 6)).prompts.sum().backward()
try:
    mope_fast.functional.route_and_mix(torch.zeros(2, 3), torch.ones(3, 4, 5), impl="triton")
except RuntimeError as error:
    assert "triton is not installed" in str(error) and "impl='auto' chooses 'reference'" in str(error), error
    print("refused")
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
"""
    )
    assert run(program) == ["refused"]


def test_without_transformers_the_error_names_what_is_supported():
    program = """
import sys
sys.modules["transformers"] = None
import torch, mope_fast
try:
    mope_fast.MoPEFusion(torch.nn.Linear(2, 2))
except TypeError as error:
    assert "BertModel" in str(error), error
    print("refused")
"""
    assert run(program) == ["refused"]


def test_a_source_tree_without_its_kernels_says_so_at_once():
    program = """
import sys
sys.modules["mope_fast.kernels"] = None
try:
    import mope_fast
except ImportError as error:
    assert "pip install -e" in str(error), error
    print("refused")
"""
    assert run(program) == ["refused"]
