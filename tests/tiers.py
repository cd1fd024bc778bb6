"""Which cases of a test are for every push, and which only for the full run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[tuple], cases: Iterable[tuple]) -> list[Any]:
    """The cases as parameters of ``pytest.mark.parametrize``, all marked slow but for these few."""
    cases = list(cases)
    if missing := [case for case in quick if case not in cases]:
        raise ValueError(f"{missing} are none of the cases")
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]
