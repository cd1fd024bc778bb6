"""Cost of MoPE-BAF's prompts on a VLMo: its step relative to the plain VLMo's. Each provider is checked, then timed."""

import pytest

from benchmarks import measure, models, suite
from benchmarks.mope_baf import GROUP


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, GROUP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_mope_baf(benchmark, point, session):
    models.run(benchmark, GROUP, point, session)
