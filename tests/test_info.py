"""python -m mope_fast.info."""

import os
import subprocess
import sys

import pytest


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
