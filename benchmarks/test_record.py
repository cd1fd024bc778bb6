"""Tests that a stopped run continues with the remaining measurements, and that no measurement is lost."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from benchmarks import record, run

KEYS = [("op", "forward", "called", f"B={size}", "ours") for size in range(3)]
SMOKE = ["-k", "tiny-ViT-B17 and inference and not lora", "--smoke"]


def measured(key: record.Key) -> SimpleNamespace:
    """Stand-in for a benchmark fixture that has finished."""
    stats = SimpleNamespace(median=1.0, q1=0.9, q3=1.1, min=0.8, max=1.2, mean=1.0, stddev=0.1, rounds=3)
    info = dict(zip(record.NAMES, key, strict=True))
    return SimpleNamespace(name="name", extra_info=info, stats=SimpleNamespace(stats=stats))


def test_measured_and_skipped_points_are_done(tmp_path):
    first = record.Record(tmp_path)
    first.begin(KEYS[0])
    first.add(measured(KEYS[0]))
    first.begin(KEYS[1])
    first.skip(KEYS[1], "no GPU")
    first.begin(KEYS[2])
    assert record.done(tmp_path) == set(KEYS[:2])
    document = record.read(tmp_path / "run001.json")
    assert [entry["stats"]["median"] for entry in document["benchmarks"]] == [1.0]
    assert [entry["reason"] for entry in document["skipped"]] == ["no GPU"]
    assert tuple(document["running"].values()) == KEYS[2]


def test_what_two_runs_died_of_is_given_up(tmp_path):
    for times in (0, 1):
        assert (KEYS[0] in record.done(tmp_path)) == (times == record.TRIES)
        record.Record(tmp_path).begin(KEYS[0])
    assert record.done(tmp_path) == {KEYS[0]}
    assert len(list(tmp_path.iterdir())) == 2
    assert {entry["reason"] for entry in record.skips(map(record.read, record.files(tmp_path)))} == {record.DIED}


def test_what_failed_is_tried_again_and_what_was_interrupted_too(tmp_path):
    for done in (False, True):
        run = record.Record(tmp_path)
        run.begin(KEYS[0])
        run.skip(KEYS[0], f"{record.FAILED}OutOfMemoryError")
        run.begin(KEYS[1])
        run.interrupted()
        assert record.done(tmp_path) == ({KEYS[0]} if done else set())
    again = record.Record(tmp_path)
    again.begin(KEYS[0])
    again.add(measured(KEYS[0]))
    assert not record.skips(map(record.read, record.files(tmp_path)))


def test_two_runs_in_one_folder_have_a_file_each(tmp_path):
    runs = [record.Record(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: pair[0].skip(pair[1], "no GPU"), zip(runs, KEYS * 2, strict=False)))
    assert len(record.files(tmp_path)) == 4
    assert record.done(tmp_path) == set(KEYS)


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_foreign_file_is_named(tmp_path, text):
    (tmp_path / "run007.json").write_text(text)
    with pytest.raises(ValueError, match=r"run007.json has no benchmark results"):
        record.Record(tmp_path)


def test_a_folder_is_of_one_device(tmp_path):
    facts = {"device": "GPU 1", "clock": "wall time", "smoke": False}
    first = record.Record(tmp_path)
    benchmark = measured(KEYS[0])
    benchmark.extra_info.update(facts)
    first.add(benchmark)
    record.Record(tmp_path).check_same(facts)
    with pytest.raises(ValueError, match="device 'GPU 1', this run's is 'GPU 2': use separate folders"):
        record.Record(tmp_path).check_same(facts | {"device": "GPU 2"})


def test_after_its_time_a_run_begins_nothing(tmp_path):
    late = record.Record(tmp_path, seconds=-1.0)
    assert late.begin(KEYS[0])  # otherwise a run with too little time would never make progress
    late.add(measured(KEYS[0]))
    assert not late.begin(KEYS[1])
    document = record.read(tmp_path / "run001.json")
    assert (document["left"], document["running"]) == (1, None)
    assert record.done(tmp_path) == {KEYS[0]}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = record.Record()
    assert memory.begin(KEYS[0])
    memory.add(measured(KEYS[0]))
    assert len(memory.benchmarks) == 1
    assert not list(tmp_path.iterdir())


def points(folder) -> list[str]:
    return [entry["name"] for file in record.files(folder) for entry in record.read(file)["benchmarks"]]


def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in an xdist worker
    for library in ("timm", "transformers"):
        pytest.importorskip(library)
    command = [sys.executable, "-m", "benchmarks.run", "end_to_end", "--output", str(tmp_path), *SMOKE]
    process = subprocess.Popen(command, cwd=run.FOLDER.parent, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not points(tmp_path):
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = points(tmp_path)
    assert before
    finished = subprocess.run(command, cwd=run.FOLDER.parent, capture_output=True, text=True, check=True)
    providers = [name.split("called-")[1].rstrip("]") for name in points(tmp_path)]
    assert sorted(providers) == ["concatenated", "folded", "frozen", "mope_fast", "paper-literal", "side", "vpt-deep"]
    assert points(tmp_path)[: len(before)] == before
    assert str(tmp_path / "REPORT.md") in finished.stdout
    assert "folded" in (tmp_path / "REPORT.md").read_text()


def test_an_unknown_group_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "end_to_endd"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no such group: end_to_endd; expected any of end_to_end," in capsys.readouterr().err
