"""Tests of what the default run measures, its time estimate, and what it prints."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest, measure, plan, run, suite
from benchmarks.cases import CENTRE, FULL
from benchmarks.report import terminal
from benchmarks.test_report import FUSED, PAPER, entry, tax_entry

MODULES = [importlib.import_module(f"benchmarks.test_{name}") for name in run.GROUPS]
GROUPS = [getattr(module, "OP", None) or getattr(module, "GROUP", None) or module.window_attention.OP for module in MODULES]


class SlowMachine(suite.Setting):
    """Return a setting for two cores without AVX-512."""

    flops_a_second = 1.2e11


def points(group: suite.Group, setting: suite.Setting) -> list[suite.Point]:
    return [
        suite.Point(mode, case, "called", provider)
        for case in group.cases(setting.device, setting.extent)
        for mode in case.modes
        for provider in group.providers_at(case, mode)
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_default_run_measures_is_a_part_of_all(device):
    for group in GROUPS:
        centre, full = ({str(case) for case in group.cases(torch.device(device), extent)} for extent in (CENTRE, FULL))
        assert centre <= full, group.name
        assert len(centre) <= 2, group.name


def test_a_default_run_leaves_room_for_groups_to_come():
    pytest.importorskip("timm")
    setting = SlowMachine(torch.device("cpu"), CENTRE)
    seconds = {group.name: sum(group.seconds(point, setting) for point in points(group, setting)) for group in GROUPS}
    assert max(seconds.values()) < 160, seconds
    assert sum(seconds.values()) < 500, seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1, "1 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "2 h"), (36000, "10 h")]
)
def test_durations(seconds, text):
    assert plan.duration(seconds) == text


def test_a_miss_is_an_error_of_ours_and_noted_of_the_others():
    truth = torch.ones(4, dtype=torch.float64)
    eager = truth.float() + 1e-3
    near, far, wrong = (truth.float() + error for error in (3e-3, 9e-3, 0.5))  # the bounds are 2e-3, and twice that for others
    (group,) = (group for group in GROUPS if group.name == "route_and_mix")
    for provider, number in (("literal", near), ("literal", far), ("mope_fast", eager)):
        with group.judged(provider) as misses:
            measure.assert_as_exact_as_eager((number,), (eager,), (truth,), ["out"])
        assert len(misses) == 2 * (number is far)
    for provider, number, message in (
        ("mope_fast", near, r"RMS error of out is 0.003, the bound is 0.002"),
        ("literal", wrong, r"RMS error of out is 0.5, the bound is 0.004"),
        ("literal", near * torch.nan, r"RMS error of out is nan"),
    ):
        with pytest.raises(AssertionError, match=message), group.judged(provider):
            measure.assert_as_exact_as_eager((number,), (eager,), (truth,), ["out"])


def test_what_is_outside_its_bound_is_marked():
    miss = "RMS error of out is 2, the bound is 1"
    entries = [entry("literal", 30.0, inexact=[miss]), entry("matmul", 20.0, inexact=[]), entry("mope_fast", 10.0)]
    lines = terminal.tables([{"benchmarks": entries}]).splitlines()
    assert [line.split("  ")[1] for line in lines if "us" in line] == ["paper-literal eager *", "matmul eager", "mope_fast"]
    assert lines[-1] == f"* route_and_mix, forward+backward, replay, {PAPER}, paper-literal eager: {miss}"


def test_ours_alone_has_no_speed_over_others():
    assert terminal.tables([{"benchmarks": [entry("mope_fast", 10.0)]}]).splitlines()[-1].split() == ["mope_fast", "-", "10", "us"]


def test_tables_have_taxes_times_and_reasons():
    entries = [tax_entry("frozen", 1.0), tax_entry("mope_fast", 1.04), tax_entry("mope_fast", 1.02, mode="inference")]
    where = {"op": "end_to_end", "mode": "training", "timing": "called", "case": "some"}
    skipped = [where | {"provider": name, "reason": "peft is not installed"} for name in ("lora", "lora", "full")]
    text = terminal.tables([{"benchmarks": entries[:1], "skipped": skipped}, {"benchmarks": entries[1:]}])
    assert f"end_to_end, {FUSED}: time over the frozen encoder's, median time" in text
    assert [line.split() for line in text.splitlines() if "mope_fast  " in line] == [
        ["mope_fast", "1.040", "1.04", "ms", "1.020", "1.02", "ms"]
    ]
    assert text.endswith("not measured, peft is not installed:\n  end_to_end lora, end_to_end full")


@pytest.fixture
def printed(monkeypatch, tmp_path):
    """Return a function of extra arguments that runs a smoke run of ``route_and_mix`` in one folder and returns its output."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in an xdist worker

    def smoke(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "benchmarks/test_route_and_mix.py", "--benchmark-only", "--smoke"]
        command += ["--results", str(tmp_path), *arguments]
        ran = subprocess.run(command, cwd=run.FOLDER.parent, capture_output=True, text=True, check=False)
        assert ran.returncode in (0, run.NOTHING_LEFT), ran.stdout
        return ran.stdout

    return smoke


@pytest.mark.parametrize(
    ("options", "message"),
    [({"full": True, "smoke": True}, "give only one of them"), ({"benchmark_only": True, "numprocesses": 2}, "drop -n")],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    config = SimpleNamespace(getoption=lambda name, default=None: options.get(name, default))
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


def test_a_measurement_that_left_no_entry_moves_no_line(monkeypatch):
    (group,) = (group for group in GROUPS if group.name == "route_and_mix")
    first, second = points(group, SlowMachine(torch.device("cpu"), CENTRE))[:2]
    lines = []
    progress = plan.Progress.__new__(plan.Progress)
    progress.plan = plan.Plan([(group, first), (group, second)], SlowMachine(torch.device("cpu"), CENTRE))
    progress.record = SimpleNamespace(entry={second.key(group): {"reason": "peft is not installed"}}.get)
    progress.numbers = {"first": 0, "second": 1}
    monkeypatch.setattr(progress, "_reporter", lambda: SimpleNamespace(ensure_newline=lambda: None, write_line=lines.append))
    for nodeid in progress.numbers:
        progress.pytest_runtest_logstart(nodeid)
        progress.pytest_runtest_logfinish(nodeid)
    (line,) = lines
    assert f"[2/2, done] {second.mode} {second.provider}: not measured" in line


def test_a_run_prints_plan_progress_and_tables(printed):
    out = printed("-k", "not mope_fast", "--budget", "1e-9")
    assert "15 measurements are left, because the budget is used up" in out
    printed("-k", "not mope_fast")
    out = printed()
    begin, middle, end = (out.index(part) for part in ("4 measurements, about", "[1/4, ", "mope_fast and the others"))
    assert begin < middle < end
    assert "not measured, a smoke run compiles nothing:" in out
    assert "4 passed" in out
    ours = [line.split() for line in out.splitlines() if line.startswith("  mope_fast")]
    assert len(ours) == 2  # sizes, each with a speed over what an earlier run measured
    assert all(line[1].endswith("x") for line in ours)
    again = printed()
    assert "nothing is left to measure" in again
    assert out[end:].split("short test")[0].split("====")[0] == again[again.index("mope_fast and") :].split("====")[0]
