"""Tests of what counts as slower between two sets of results."""

import json

import pytest

from benchmarks import compare
from benchmarks.test_report import entry, tax_entry


@pytest.fixture
def changes(tmp_path):
    """Return a function from (old entries, new entries) to exit status and lines."""

    def run(capsys, old, new, *arguments, skipped=()):
        for name, entries in (("old", old), ("new", new)):
            document = {"benchmarks": entries, "skipped": list(skipped) if name == "new" else []}
            (tmp_path / f"{name}.json").write_text(json.dumps(document))
        status = compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


# an entry's quartiles are at 0.9 and 1.1 of its median, a tax' spread is 1 %
@pytest.mark.parametrize(
    ("factor", "arguments", "status", "verdict"),
    [
        (1.0, (), 0, "1 the same"),
        (1.2, (), 0, "1 the same"),
        (1.25, (), 1, "slower: "),
        (0.8, (), 0, "faster: "),
        (0.85, (), 0, "1 the same"),
        (1.25, ("--least", "0.3"), 0, "1 the same"),
    ],
)
def test_times_are_told_apart_by_their_quartiles(changes, capsys, factor, arguments, status, verdict):
    got, lines = changes(capsys, [entry("triton", 100.0)], [entry("triton", 100.0 * factor)], *arguments)
    assert got == status
    assert lines[0].startswith(verdict)
    if verdict == "slower: ":
        assert "triton: 100.0 us -> 125.0 us (1.250x)" in lines[0]
        assert lines[1] == "1 slower"


@pytest.mark.parametrize(("tax", "status", "verdict"), [(1.03, 0, "1 the same"), (1.05, 1, "slower: "), (0.95, 0, "faster: ")])
def test_taxes_are_compared_where_there_are_any(changes, capsys, tax, status, verdict):
    got, lines = changes(capsys, [tax_entry("mope_fast", 1.0)], [tax_entry("mope_fast", tax)])
    assert got == status
    assert lines[0].startswith(verdict)


def test_memory_counts_too(changes, capsys):
    old, new = (entry("triton", 100.0, peak_memory=peak) for peak in (2**20, 2**21))
    status, lines = changes(capsys, [old], [new])
    assert (status, lines[-1]) == (1, "1 more memory")
    assert "1.0 MiB -> 2.0 MiB (2.000x)" in lines[0]
    assert changes(capsys, [new], [old])[0] == 0


def test_what_is_there_only_once_is_counted_and_what_fails_now_is_told(changes, capsys):
    old = [entry("triton", 100.0), entry("auto", 90.0), entry("reference", 300.0)]
    info = old[1]["extra_info"]
    names = {name: info[name] for name in ("op", "mode", "timing", "case", "provider")}
    failed = [{**names, "reason": "failed, RuntimeError: boom"}]
    status, lines = changes(capsys, old, [old[0], entry("compiled", 50.0)], skipped=failed)
    assert status == 1
    assert lines[0].startswith("failed now: ")
    assert lines[0].endswith("-> failed, RuntimeError: boom")
    assert lines[1] == "1 failed now, 1 the same, 1 only in new, 1 only in old"


def test_the_worst_comes_first(changes, capsys):
    old = [entry("triton", 100.0), entry("auto", 100.0)]
    status, lines = changes(capsys, old, [entry("triton", 150.0), entry("auto", 200.0)])
    assert status == 1
    assert ["auto" in line for line in lines[:2]] == [True, False]
    assert "triton: 100.0 us -> 150.0 us" in lines[1]


def test_several_runs_tell_how_much_a_machine_drifts(changes, capsys):
    """125 is beyond one run's quartiles, but not beyond the spread over runs."""
    runs = [entry("triton", time) for time in (100.0, 96.0, 120.0)]
    assert changes(capsys, runs[:1], [entry("triton", 125.0)])[0] == 1
    assert changes(capsys, runs, [entry("triton", 125.0)])[0] == 0
    status, lines = changes(capsys, runs, [entry("triton", 150.0)])
    assert status == 1
    assert "triton: 100.0 us -> 150.0 us" in lines[0]


def test_results_that_can_not_be_compared_are_refused(changes, capsys, tmp_path):
    for fact, value in (("device", "GPU 2"), ("clock", "CPU time")):
        with pytest.raises(SystemExit):
            changes(capsys, [entry("triton", 100.0)], [entry("triton", 100.0, **{fact: value})])
        assert f"new ones {value}: it must be the same" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("[1]")
    for path, message in (
        ("empty", "has no *.json"),
        ("bad.json", "is not a result of these benchmarks"),
        ("gone.json", "No such file"),
    ):
        with pytest.raises(SystemExit):
            compare.main([str(tmp_path / path), str(tmp_path / path)])
        assert message in capsys.readouterr().err


def test_folders_are_read_whole(tmp_path, capsys):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for provider in ("triton", "auto"):
            (tmp_path / name / f"{provider}.json").write_text(json.dumps({"benchmarks": [entry(provider, 100.0)]}))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == "2 the same\n"
