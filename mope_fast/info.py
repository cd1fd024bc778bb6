"""``python -m mope_fast.info`` prints versions, devices, the implementation each function would use, and why not the others."""

import importlib.metadata
import platform

import torch

from . import __version__
from ._implementations import DEFAULT_IMPL, IMPLEMENTATIONS, Problem, choose, why_not

PACKAGES = ("torch", "triton", "transformers", "timm", "xformers", "safetensors")
DTYPES = (torch.float32, torch.bfloat16)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, torch.device]:
    """Return a description of each device -> the device, CPU first."""
    devices = {f"CPU, {torch.get_num_threads()} threads": torch.device("cpu")}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability, memory = f"{properties.major}.{properties.minor}", properties.total_memory / 2**30
        name = f"{properties.name}, compute capability {capability}, {memory:.0f} GiB"
        devices[name] = torch.device("cuda", index)
    return devices


def report() -> str:
    """Return the whole report as text."""
    lines = [f"mope_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {package:<13}{_version(package)}" for package in PACKAGES]
    lines.append(f"  MOPE_FAST_IMPL={DEFAULT_IMPL}")
    for name, device in _devices().items():
        lines += ["", f"{device}: {name}"]
        for function in IMPLEMENTATIONS:
            # a MOPE_FAST_IMPL that can't be used is reported here instead of raised
            for dtype in DTYPES:
                try:
                    chosen = choose(function, "auto", Problem(device, dtype))
                except RuntimeError as error:
                    chosen = f"none ({error})"
                lines.append(f"  {function} ({str(dtype).removeprefix('torch.')}): {chosen}")
            lines += [f"    not {name}: {reason}" for name, reason in why_not(function, Problem(device, DTYPES[0])).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
