import datetime
import math
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import environment, measure, models, suite
from benchmarks.plan import Progress
from benchmarks.record import Record


def pytest_addoption(parser):
    group = parser.getgroup("mope_fast benchmarks")
    group.addoption("--full", action="store_true", help="measure all sizes, not one of each group: hours on a CPU")
    group.addoption("--smoke", action="store_true", help="tiny sizes, no compiled baselines, few rounds: only check that it runs")
    group.addoption("--results", metavar="DIR", type=Path, help="save each measurement here at once; skip those already saved")
    group.addoption("--budget", metavar="SECONDS", type=float, default=math.inf, help="start no measurement after this time")
    group.addoption("--compile-on-cpu", action="store_true", help="compile encoders on a CPU too, where each takes minutes")
    group.addoption("--cpu-time", action="store_true", help="one thread, CPU time instead of wall time: for a busy machine, no GPU")


def pytest_configure(config):
    if config.getoption("full") and config.getoption("smoke"):
        raise pytest.UsageError("--full measures all sizes, --smoke tiny ones: give only one of them")
    if config.getoption("benchmark_only") and config.getoption("numprocesses", None):
        raise pytest.UsageError("parallel processes (-n) would disturb each other's measurements: drop -n or --benchmark-only")
    # Inductor's workers, which start with the first compiled provider, would take cores from the next ones
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config.stash[suite.GROUPS] = {}
    config.stash[suite.RECORD] = Record(config.getoption("results"), config.getoption("budget"))
    if config.getoption("cpu_time"):
        if torch.cuda.is_available():
            raise pytest.UsageError("--cpu-time doesn't include GPU time: hide the GPU (CUDA_VISIBLE_DEVICES=) or drop the option")
        measure.count_cpu_time()

    # a benchmark that failed reports its own error
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    if not (config.getoption("benchmark_disable") or config.getoption("numprocesses", None)):
        config.option.benchmark_quiet = True  # pytest-benchmark's own tables are printed only with -v
        config.pluginmanager.register(Progress(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Deselect the benchmark code's own tests with --benchmark-only, so that they are not listed as skips."""
    if config.getoption("benchmark_only"):
        others = [item for item in items if "benchmark" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.INTERRUPTED and session.config.stash[suite.RECORD].running:
        session.config.stash[suite.RECORD].interrupted()


def pytest_collection_finish(session):
    """Plan only the measurements that ``-k`` selects."""
    session.config.stash[suite.RECORD].planned = len(suite.measurements(session.items))


def pytest_benchmark_generate_machine_info(config):
    return environment.describe(environment.default_device())


def pytest_benchmark_generate_commit_info(config):
    return {"id": environment.commit()}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Add what was skipped and why. Keep the statistics and drop single timings, which are most of the file."""
    output_json["skipped"] = config.stash[suite.RECORD].skipped
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


@pytest.fixture(scope="module", autouse=True)
def _drop_divisors():
    """Drop a finished group's divisors to free their memory for the next group."""
    yield
    models.drop_divisors()


@pytest.fixture(scope="session")
def session(request) -> suite.Session:
    """Measure once the copy bandwidth and, if no datasheet is known, the arithmetic peak."""
    setting = suite.setting(request.config)
    device, smoke = setting.device, setting.smoke
    facts = {
        **environment.describe(device),
        "clock": "CPU time" if measure.clock is time.process_time else "wall time",
        "commit": environment.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "copy_bandwidth_gbps": measure.copy_bandwidth(device, smoke) / 1e9,
        **measure.peak_arithmetic(device, environment.device_name(device), smoke),
        "smoke": smoke,
    }
    try:
        request.config.stash[suite.RECORD].check_same(facts)
    except ValueError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    return suite.Session(setting, facts, request.config.stash[suite.RECORD])
