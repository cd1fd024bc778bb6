"""The MoPE tax on Swin Transformers, whose attention is in windows. Each provider is checked, then timed."""

import pytest

from benchmarks import fused_encoders, measure, models, suite
from benchmarks.cases.fused_encoders import swin_cases

GROUP = fused_encoders.group("fused_swin", swin_cases)


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_fused_swin(benchmark, point, session):
    models.run(benchmark, GROUP, point, session)
