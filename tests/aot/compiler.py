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

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
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
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
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


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Specialise as Triton's own launcher does (None and 1 are constants, 16 divides or doesn't), then compile."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _POINTEES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = specialise and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
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
