"""Compile recorded Triton launches for GPUs that aren't there, and read what the compiler made of them."""

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# sm_80 has the instructions of sm_86 and more room, so a few cases are enough of it
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_POINTEES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.bool: "i1"}


@dataclass
class Launch:
    """One call ``kernel[grid](*args, **kwargs)`` that was recorded, not run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Recorder:
    """Stands in for a kernel: keeps its launches in ``launches``."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        def record(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
            bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
            self.launches.append(Launch(self.kernel, grid, dict(bound.arguments), options))

        return record


@dataclass
class Compiled:
    """What one launch became on one GPU."""

    name: str
    shared: int
    ptx: str
    spills: int


def _specialise(value: Any, specialise: bool) -> tuple[str, bool]:
    """The type of one argument, and whether 16 divides it."""
    if value is None or (specialise and type(value) is int and value == 1):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return "*" + _POINTEES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return "i32" if abs(value) < 2**31 else "i64", specialise and value % 16 == 0


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Specialise as Triton's own launcher does (None and 1 are constants, 16 divides or doesn't), then compile."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        elements = {(index, i): element for i, element in enumerate(value)} if isinstance(value, tuple) else {(index,): value}
        types = []
        for path, element in elements.items():
            kind, divisible = _specialise(element, not parameter.do_not_specialize)
            types.append(kind)
            if kind == "constexpr":
                constants[path] = element
            elif divisible:
                attributes[path] = [["tt.divisibility", 16]]
        signature[parameter.name] = tuple(types) if isinstance(value, tuple) else types[0]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return Compiled(launch.kernel.fn.__name__, compiled.metadata.shared, compiled.asm["ptx"], _spills(compiled.asm["cubin"]))


def _spills(cubin: bytes) -> int:
    """Bytes of local memory a thread uses; 0 means that nothing is spilled."""
    tool = Path(triton.knobs.nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"(?:LOCAL|STACK):(\d+)", usage))


def assert_fits(compiled: Compiled, capability: int) -> None:
    """Into shared memory, with products of float32 in float32 and without atomics."""
    assert compiled.shared <= SHARED_MEMORY[capability], f"{compiled.name}: {compiled.shared} bytes of shared memory"
    assert ".tf32" not in compiled.ptx, f"{compiled.name} rounds float32 products to TF32"
    assert not re.search(r"\b(atom|red)\.", compiled.ptx), f"{compiled.name} uses atomics"


def assert_wide_words(compiled: Compiled, reads: str = r"ld\.global|cp\.async", narrow: str | tuple[str, ...] = ".b16") -> None:
    """Instructions ``reads`` and stores move words of 16 bytes, and none reads the type ``narrow`` one by one."""
    loads = re.findall(rf"(?:{reads})[.\w:]*", compiled.ptx)
    assert any(load.endswith(".v4.b32") or "cp.async.cg" in load for load in loads), f"{compiled.name}: {set(loads)}"
    assert not any(load.endswith(narrow) for load in loads), f"{compiled.name}: {set(loads)}"
    assert re.search(r"st\.global[.\w:]*\.v4\.b32", compiled.ptx), f"{compiled.name}: narrow stores"


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and strides, one element off every boundary of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def innermost_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, the first dimension innermost."""
    order = list(range(tensor.dim()))
    return torch.empty([tensor.shape[i] for i in order[::-1]], dtype=tensor.dtype).permute(order[::-1])
