"""``receptive_field_attention``: groups of positions that see only some groups. Each provider is checked, then timed."""

import pytest

from benchmarks import attention, measure, suite
from benchmarks.cases.attention import receptive_field_attention

OP = attention.op("receptive_field_attention", receptive_field_attention)


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, OP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_receptive_field_attention(benchmark, point, session):
    suite.run(benchmark, OP, point, session)
