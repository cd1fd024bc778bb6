"""Facts saved with a result: device, versions, commit. No host or user names."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import mope_fast


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from cpuinfo import get_cpu_info

    return get_cpu_info().get("brand_raw", platform.machine())


def slug(name: str) -> str:
    """Turn a device's name into a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def commit() -> str:
    """Return the checkout's commit, with -dirty if it was changed; BENCHMARK_COMMIT overrides it, for use without git."""
    if "BENCHMARK_COMMIT" in os.environ:
        return os.environ["BENCHMARK_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    project = Path(__file__).parents[1]
    own = os.environ | {"GIT_CEILING_DIRECTORIES": str(project.parent)}  # ignore a repository around an unpacked sdist
    try:
        answer = subprocess.run(command, cwd=project, env=own, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def describe(device: torch.device) -> dict[str, str | int | None]:
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "mope_fast": mope_fast.__version__,
    }
