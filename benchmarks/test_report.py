import json

import pytest

from benchmarks import report
from benchmarks.cases import CUDA, Case

PAPER, LARGE = CUDA[0], CUDA[5]


def entry(provider: str, microseconds: float, *, case: Case = PAPER, mode: str = "forward+backward", **info) -> dict:
    """A pytest-benchmark record of 10 calls an iteration on a made-up GPU that copies 4,000 GB/s."""
    seconds = 10 * microseconds * 1e-6
    facts = {
        "device": "GPU 1", "device_type": "cuda", "cpu_threads": 2, "python": "3", "torch": "2", "triton": "3", "mope_fast": "0",
        "commit": "abc", "clock": "wall time", "date": "2026-01-01", "copy_bandwidth_gbps": 4000.0, "l2": "cold",
        "implementation": "triton",
        "mode": mode, "timing": "replay", "provider": provider, "calls_per_iteration": 10, "peak_memory": 2**21,
        "bytes": case.bytes(mode), "flops": case.flops(mode),
    }  # fmt: skip
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds}
    return {"extra_info": facts | case.describe() | info, "stats": stats}


def rows(*entries: dict) -> list[report.Row]:
    return report.merge(report.parse({"benchmarks": list(entries)}))


def test_time_is_that_of_one_call():
    (row,) = rows(entry("mope_fast", 20.0))
    assert row.median == pytest.approx(20e-6)
    assert row.gbps == pytest.approx(PAPER.bytes("forward+backward") / 20e-6 / 1e9)
    assert row.copy_share == pytest.approx(row.gbps / 4000)


def test_repeated_runs_give_the_median_of_medians():
    (row,) = rows(entry("matmul", 30.0), entry("matmul", 10.0), entry("matmul", 20.0))
    assert row.median == pytest.approx(20e-6)
    assert row.info["runs"] == 3


def test_speedup_is_over_the_best_eager_form():
    (group,) = report.group(
        rows(entry("literal", 90.0), entry("matmul", 50.0), entry("matmul-compiled", 30.0), entry("mope_fast", 20.0))
    )
    assert report.speedup(group) == pytest.approx(2.5)
    assert report.speedup(group, ["matmul-compiled"]) == pytest.approx(1.5)


@pytest.mark.parametrize(("ours", "answer"), [(19.9, "met"), (25.0, "missed by 20%")])
def test_goal_at_the_paper_size(ours, answer):
    groups = report.group(rows(entry("matmul", 50.0), entry("mope_fast", ours)))
    line = report.goals_table(groups, "cuda").splitlines()[2]
    assert answer in line
    assert str(PAPER) in line


def test_goal_for_bandwidth_uses_the_copy_of_the_session():
    perfect = LARGE.bytes("forward") / 4e12 * 1e6
    groups = report.group(rows(entry("mope_fast", perfect / 0.9, case=LARGE, mode="forward")))
    (line,) = [each for each in report.goals_table(groups, "cuda").splitlines() if str(LARGE) in each]
    assert "0.90" in line
    assert line.endswith("met |")


def test_goal_without_a_measurement_says_so():
    groups = report.group(rows(entry("mope_fast", 20.0)))
    assert report.goals_table(groups, "cuda").count("not measured") == 5


def test_losses_name_the_winner_and_the_gap():
    groups = report.group(rows(entry("matmul", 10.0), entry("mope_fast", 15.0)))
    (line,) = report.losses(groups)
    assert "matmul eager takes 10.0 us, mope_fast 15.0 us (50% more)" in line
    assert report.losses(report.group(rows(entry("matmul", 20.0), entry("mope_fast", 15.0)))) == []


def test_report_and_pictures_are_written(tmp_path):
    source = tmp_path / "run.json"
    source.write_text(json.dumps({"benchmarks": [entry("literal", 90.0), entry("matmul", 50.0), entry("mope_fast", 20.0)]}))
    text = report.write([source], tmp_path / "out").read_text()
    assert "| mope_fast | 20.0 | 18.0 - 22.0 | 2.50x |" in text
    for picture in ("times_forward_backward_replay.png", "speedup.png", "copy_share.png"):
        assert f"({picture})" in text
        assert (tmp_path / "out" / picture).stat().st_size > 0


def test_two_devices_are_refused(tmp_path):
    source = tmp_path / "run.json"
    source.write_text(json.dumps({"benchmarks": [entry("matmul", 50.0), entry("mope_fast", 20.0, device="GPU 2")]}))
    with pytest.raises(SystemExit, match="GPU 1, GPU 2"):
        report.write([source], tmp_path / "out")
