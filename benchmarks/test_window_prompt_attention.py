"""``window_prompt_attention``: attention in windows whose queries also see prompts. Each provider is checked, then timed."""

import pytest

from benchmarks import measure, suite, window_attention


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, window_attention.OP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_window_prompt_attention(benchmark, point, session):
    suite.run(benchmark, window_attention.OP, point, session)
