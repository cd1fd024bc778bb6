"""``prompt_attention``: queries that also see key/value prefixes. Each provider is checked, then timed."""

import pytest

from benchmarks import attention, measure, suite
from benchmarks.cases.attention import prompt_attention

OP = attention.op("prompt_attention", prompt_attention)


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, OP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_prompt_attention(benchmark, point, session):
    suite.run(benchmark, OP, point, session)
