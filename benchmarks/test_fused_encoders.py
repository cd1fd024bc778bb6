"""The MoPE tax: what a fused model's step costs over the frozen encoder's own. Each provider is checked, then timed."""

import pytest

from benchmarks import fused_encoders, measure, suite


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, fused_encoders.GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_fused_encoders(benchmark, point, session):
    fused_encoders.run(benchmark, point, session)
