"""python -m mope_fast.info."""

import os
import re
import subprocess
import sys

import pytest
import torch

from mope_fast import _dispatch, _implementations, functional, info
from mope_fast._implementations import Problem, choose


def run(**environment) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "mope_fast.info"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"TRITON_INTERPRET": "0"},
            [
                "route_and_mix (float32): reference",
                "  prompt_attention (float32): sdpa",
                "  window_prompt_attention (float32): cpu",
                "not triton: the tensors are on cpu",
            ],
        ),
        ({"TRITON_INTERPRET": "1"}, ["route_and_mix (float32): triton"]),
        (
            {"TRITON_INTERPRET": "0", "MOPE_FAST_IMPL": "triton"},
            [
                "route_and_mix (float32): none (",
                "window_prompt_attention (bfloat16): none (",
                "importance_loss (float32): reference",
            ],
        ),
    ],
)
def test_report_names_versions_devices_choices_and_reasons(environment, expected):
    report = run(**environment)
    for part in ("mope_fast 0.", "torch ", "cpu: CPU", "importance_loss", *expected):
        assert part in report


GPU = torch.device("cuda", 0)
ATTENTION = ("prompt_attention", "receptive_field_attention")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if there were a GPU that Triton can run on, and gcc in a folder that is the PATH; gives that folder."""
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "auto")
    monkeypatch.setattr(_implementations, "INTERPRETED", False)
    monkeypatch.setattr(_implementations, "HAS_TRITON", True)
    monkeypatch.setattr(_implementations, "_cached_capability", lambda device: (9, 0))
    monkeypatch.setattr(_implementations, "_why_not_loaded_xformers", lambda: "not here")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(info, "_devices", lambda: {"a GPU": GPU})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_implementations.sysconfig, "get_path", lambda *arguments: str(tmp_path))
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    _implementations._found_no_compiler.cache_clear()
    yield tmp_path
    _implementations._found_no_compiler.cache_clear()


def chosen(dtype=torch.bfloat16, keys=200, masked=False) -> dict[str, str]:
    problem = Problem(GPU, dtype, keys, masked, head_dim=16)
    return {
        function: choose(function, "auto", problem)
        for function in _implementations.IMPLEMENTATIONS
        if function != "importance_loss"
    }


def test_on_a_gpu_auto_takes_triton_but_for_attention_without_a_mask_in_float32_or_of_many_keys(gpu):
    assert set(chosen().values()) == {"triton"}
    assert set(chosen(torch.float32, masked=True).values()) == {"triton"}
    for others in (chosen(torch.float32), chosen(keys=513)):
        assert {name: impl for name, impl in others.items() if impl != "triton"}.keys() >= set(ATTENTION)
        assert {others[name] for name in ATTENTION} == {"sdpa"}
        assert others["route_and_mix"] == "triton"
    assert all(choose(name, "triton", Problem(GPU, torch.float32, 200)) == "triton" for name in ATTENTION)
    assert "not triton: impl='auto' leaves float32 without a mask tensor to torch's kernels until a GPU" in info.report()


def test_autocast_decides_by_its_own_dtype(gpu, monkeypatch):
    problems = []
    monkeypatch.setattr(_dispatch, "choose", lambda function, impl, problem: problems.append(problem) or "reference")
    q = torch.zeros(1, 1, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        functional.prompt_attention(q, q, q)
        functional.window_prompt_attention(torch.zeros(1, 2, 2, 3, 1, 8), (), torch.zeros(1, 4, 4), window_size=2, shift_size=0)
    assert [problem.dtype for problem in problems] == [torch.bfloat16] * 2


def test_on_rocm_auto_takes_torchs_own_and_triton_on_request(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert set(chosen().values()) == {"sdpa", "reference"}
    assert choose("route_and_mix", "triton", Problem(GPU, torch.bfloat16)) == "triton"
    assert info.report().count("not triton: impl='auto' leaves it out on ROCm, where its kernels have not been run") == 4


@pytest.mark.parametrize(
    ("named", "got"),
    [(None, "neither gcc nor clang is on the PATH"), ("tcc", "CC='tcc' is not a program"), ("", "CC='' is not a program")],
)
def test_without_a_c_compiler_auto_takes_torchs_own_and_triton_says_what_to_install(named, got, gpu, monkeypatch):
    if named is None:
        (gpu / "gcc").unlink()
    else:
        monkeypatch.setenv("CC", named)
    assert set(chosen().values()) == {"sdpa", "reference"}
    message = f"Triton needs a C compiler to launch kernels, and {got}: install gcc"
    with pytest.raises(RuntimeError, match=f"got impl='triton', which can't run on .* tensors on cuda:0: {message}"):
        choose("prompt_attention", "triton", Problem(GPU, torch.bfloat16))
    assert info.report().count(f"not triton: {message}") == 4


def test_without_pythons_headers_auto_takes_torchs_own_and_triton_says_what_to_install(gpu):
    (gpu / "Python.h").unlink()
    assert set(chosen().values()) == {"sdpa", "reference"}
    message = f"Triton needs Python's headers to launch kernels, and {gpu} has no Python.h (apt install python3-dev)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        choose("prompt_attention", "triton", Problem(GPU, torch.bfloat16))
    assert info.report().count(f"not triton: {message}") == 4


@pytest.mark.parametrize("how", ["clang", "CC", "knob", "CPATH"])
def test_a_compiler_is_found_where_triton_finds_it(how, gpu, monkeypatch):
    (gpu / "gcc").rename(gpu / ("clang" if how == "clang" else "another"))
    if how == "CC":
        monkeypatch.setenv("CC", str(gpu / "another"))
    if how == "CPATH":
        (gpu / "another").rename(gpu / "gcc")
        (gpu / "include").mkdir()
        (gpu / "Python.h").rename(gpu / "include" / "Python.h")
        monkeypatch.setenv("CPATH", f"/nowhere:{gpu / 'include'}")
    if how == "knob":
        knobs = pytest.importorskip("triton", reason="triton is not installed").knobs
        monkeypatch.setattr(knobs.build, "impl", lambda *args: None)
    assert set(chosen().values()) == {"triton"}


def test_the_search_for_a_compiler_is_made_once_and_not_while_compiling(gpu, monkeypatch):
    (gpu / "gcc").unlink()
    problem = Problem(GPU, torch.bfloat16)

    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def step(x):
        return x + (choose("route_and_mix", "auto", problem) == "reference")

    assert set(chosen().values()) == {"sdpa", "reference"}
    monkeypatch.setattr(_implementations.shutil, "which", lambda name: pytest.fail("asked again"))
    assert step(torch.zeros(1)) == 1
