"""Cost of prompts on the host. Each provider is checked, then timed."""

import pytest
import torch

from benchmarks import host, measure, models, suite
from benchmarks.cases import CENTRE
from benchmarks.cases.end_to_end import host_cases
from benchmarks.host import GROUP

CPU = torch.device("cpu")


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        suite.parametrize(metafunc, GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_host(benchmark, point, session):
    models.run(benchmark, GROUP, point, session)


def test_folding_saves_launches_and_the_frozen_layer_has_the_fewest():
    pytest.importorskip("timm")
    case = host_cases(CPU, CENTRE)[0]
    frozen, folded, unfolded = (host.launches_a_layer(name, case, CPU) for name in ("frozen", "folded", "mope_fast"))
    assert frozen < folded < unfolded
