import statistics

import pytest
import torch

from benchmarks import measure


def test_a_drift_that_both_see_changes_no_ratio(monkeypatch):
    """Calls get slower over time; ``target`` takes 1.02 times as long as ``other``."""
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds * (1 + now / 100)

    monkeypatch.setattr(measure, "synchronised_time", lambda: now)
    turns, rounds = measure.InTurns(lambda: work(1.0), calls=2), []
    for _ in range(8):
        turns.before()
        start = now
        work(1.02), work(1.02)
        rounds.append((now - start) / 2)
    assert rounds[-1] > 1.3 * rounds[0]
    ratios = turns.ratios(rounds)
    assert len(ratios) == 8
    assert statistics.median(ratios) == pytest.approx(1.02, abs=2e-3)


def test_ratios_leave_the_warm_up_out():
    turns = measure.InTurns(lambda: None, calls=1)
    turns.seconds = [100.0, 1.0, 3.0]
    turns.before = lambda: turns.seconds.append(1.0)
    assert turns.ratios([4.0, 4.0]) == [2.0, 2.0]


def test_peak_memory_on_a_cpu_is_of_what_lives_at_one_time():
    x = torch.randn(256, 256)

    def target():
        a = x + 1
        b = a @ x
        del a
        return b.relu()

    assert measure.peak_memory(target, torch.device("cpu")) == 2 * x.nbytes
