"""The MoPE tax: what a fused model's step costs over the frozen encoder's own. Each provider is checked, then timed."""

import pytest

from benchmarks import fused_encoders, measure, models, suite
from benchmarks.baselines.fused_encoders import FROZEN_WITH_SDPA
from benchmarks.cases.fused_encoders import cases

GROUP = fused_encoders.group("fused_encoders", cases, without=[FROZEN_WITH_SDPA])  # these encoders use it as they are


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_fused_encoders(benchmark, point, session):
    models.run(benchmark, GROUP, point, session)
