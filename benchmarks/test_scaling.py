"""Growth of the MoPE tax with K, L, B and S. Each provider is checked, then timed."""

import pytest

from benchmarks import measure, models, suite
from benchmarks.scaling import GROUP


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_scaling(benchmark, point, session):
    models.run(benchmark, GROUP, point, session)
