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
    group.addoption("--full", action="store_true", help="all sizes, not one of each group: hours on a CPU")
    group.addoption("--smoke", action="store_true", help="tiny sizes, no compiled baselines, few rounds: does it run at all?")
    group.addoption("--results", metavar="DIR", type=Path, help="save each measurement here at once; leave out those it has")
    group.addoption("--budget", metavar="SECONDS", type=float, default=math.inf, help="begin no measurement after so many")
    group.addoption("--compile-on-cpu", action="store_true", help="compiled encoders on a CPU too, where each takes minutes")
    group.addoption("--cpu-time", action="store_true", help="one thread, CPU time instead of wall time: for a busy machine, no GPU")


def pytest_configure(config):
    if config.getoption("full") and config.getoption("smoke"):
        raise pytest.UsageError("--full measures all sizes, --smoke tiny ones: take one of them")
    if config.getoption("benchmark_only") and config.getoption("numprocesses", None):
        raise pytest.UsageError("processes beside each other (-n) would measure each other: drop -n, or drop --benchmark-only")
    # its workers, which start with the first compiled provider, would take cores from the next ones
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config.stash[suite.GROUPS] = {}
    config.stash[suite.RECORD] = Record(config.getoption("results"), config.getoption("budget"))
    if config.getoption("cpu_time"):
        if torch.cuda.is_available():
            raise pytest.UsageError(
                "--cpu-time leaves out what a GPU does: hide the GPU (CUDA_VISIBLE_DEVICES=) or drop the option"
            )
        measure.count_cpu_time()

    # one that failed says so itself
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    if not (config.getoption("benchmark_disable") or config.getoption("numprocesses", None)):
        config.option.benchmark_quiet = True  # its tables are of nodes and rounds; with -v they are printed too
        config.pluginmanager.register(Progress(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Where only benchmarks are asked for, the tests of what measures them are no skips to list."""
    if config.getoption("benchmark_only"):
        others = [item for item in items if "benchmark" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.INTERRUPTED and session.config.stash[suite.RECORD].running:
        session.config.stash[suite.RECORD].interrupted()


def pytest_collection_finish(session):
    """What ``-k`` left out is not planned."""
    session.config.stash[suite.RECORD].planned = len(suite.measurements(session.items))


def pytest_benchmark_generate_machine_info(config):
    return environment.describe(environment.default_device())


def pytest_benchmark_generate_commit_info(config):
    return {"id": environment.commit()}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Adds what was skipped and why. Keeps the statistics and drops the single timings, which are most of the file."""
    output_json["skipped"] = config.stash[suite.RECORD].skipped
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


@pytest.fixture(scope="module", autouse=True)
def _drop_divisors():
    """Of a group that has ended, so that the next has their memory."""
    yield
    models.drop_divisors()


@pytest.fixture(scope="session")
def session(request) -> suite.Session:
    """The copy bandwidth and, where no datasheet is known, the peak of arithmetic are measured here, once."""
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
