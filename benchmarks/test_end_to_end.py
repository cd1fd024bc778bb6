"""The MoPE tax: a fused model's step time relative to the frozen encoder's. Each provider is checked, then timed."""

import pytest

from benchmarks import measure, models, suite
from benchmarks.end_to_end import GROUP


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_end_to_end(benchmark, point, session):
    models.run(benchmark, GROUP, point, session)
