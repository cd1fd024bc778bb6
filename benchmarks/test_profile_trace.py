import pytest

from benchmarks import profile_trace
from benchmarks.profile_trace import Activity, Cost, Gap


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def block(run, ts, dur):
    return event("user_annotation", f"profiled: {run}", ts, dur)


def op(name, ts, dur, identity=None, tid=1):
    return event("cpu_op", name, ts, dur, tid, **{"External id": identity})


def kernel(name, ts, dur, stream=7, identity=None, cat="kernel"):
    return event(cat, name, ts, dur, stream, stream=stream, **{"External id": identity})


def read(*events, steps=1):
    return profile_trace.read_blocks({"traceEvents": list(events)}, steps)


def activity(name, start, duration, stream=7):
    return Activity(name, start, duration, stream, None)


def test_an_ops_own_time_leaves_out_what_it_calls():
    costs = profile_trace.op_costs(
        read(block("a", 0, 100), op("linear", 10, 50), op("t", 12, 5), op("addmm", 20, 30), op("copy_", 22, 8))
    )
    assert costs == {
        "linear": Cost(1, 50, 15, 0),
        "t": Cost(1, 5, 5, 0),
        "addmm": Cost(1, 30, 22, 0),
        "copy_": Cost(1, 8, 8, 0),
    }


def test_an_op_in_one_of_its_name_counts_once_in_total():
    costs = profile_trace.op_costs(read(block("a", 0, 100), op("sum", 10, 50), op("sum", 20, 30)))
    assert costs == {"sum": Cost(2, 50, 50, 0)}


def test_ops_that_begin_together_or_touch():
    ops = profile_trace.nested([op("outer", 0, 10), op("inner", 0, 4), op("zero", 4, 0), op("next", 10, 5)])
    assert [(o.name, [p.name for p in o.parents]) for o in ops] == [
        ("outer", []), ("inner", ["outer"]), ("zero", ["outer"]), ("next", []),
    ]  # fmt: skip
    assert ops[0].self_time == 6


def test_threads_nest_on_their_own():
    costs = profile_trace.op_costs(read(block("a", 0, 100), op("backward", 0, 50, tid=1), op("mm", 10, 20, tid=2)))
    assert costs["backward"].own == 50
    assert costs["mm"].own == 20


def test_of_each_call_on_the_host_the_fastest_counts():
    """Two steps per block, two calls per step; another program slows down one call of each step."""
    durations = [(10, 90, 90, 20), (90, 21, 11, 90)]
    events = [block("a", 1000 * i, 500) for i in range(2)]
    events += [op("mm", 1000 * i + 100 * j, dur) for i, four in enumerate(durations) for j, dur in enumerate(four)]
    events += [block("b", 500, 100), op("mm", 510, 8), op("mm", 530, 6)]
    blocks = read(*events, steps=2)
    assert profile_trace.op_costs(profile_trace.of_run(blocks, "a"))["mm"] == Cost(2, 30, 30, 0)
    assert profile_trace.op_costs(profile_trace.of_run(blocks, "b"))["mm"] == Cost(1, 6, 6, 0)


def test_of_each_kernel_the_median_counts():
    events = [part for i, dur in enumerate((10, 12, 90)) for part in (block("a", 1000 * i, 500), kernel("k", 1000 * i + 1, dur))]
    assert profile_trace.kernel_costs(read(*events))["k"].total == 12


def test_blocks_whose_steps_differ():
    blocks = read(block("a", 0, 100), op("mm", 1, 10), block("a", 200, 100), op("mm", 201, 4), op("mm", 210, 4), op("add", 220, 1))
    costs = profile_trace.op_costs(blocks)
    assert costs["mm"] == Cost(1.5, 8, 8, 0)
    assert costs["add"].calls == 0.5


def test_what_ran_before_the_first_block_is_in_none():
    (only,) = read(op("warm-up", 1, 5), kernel("warm-up", 2, 5), block("a", 10, 20), op("mm", 11, 2))
    assert [o.name for o in only.ops] == ["mm"]
    assert not only.activities


def test_kernels_may_end_behind_their_blocks_host_time():
    first, second = read(block("a", 0, 10), kernel("late", 15, 4), block("b", 30, 10), kernel("other", 31, 1))
    assert [a.name for a in first.activities] == ["late"]
    assert [a.name for a in second.activities] == ["other"]


def test_a_kernels_time_is_its_ops_and_copies_are_kernels():
    blocks = read(
        block("a", 0, 100), op("softmax", 1, 9, 5), op("_softmax", 2, 6, 6), op("copy_", 20, 5, 8),
        kernel("softmax_kernel", 30, 40, identity=6), kernel("Memcpy DtoD", 70, 3, identity=8, cat="gpu_memcpy"),
        kernel("in a graph", 80, 2),
    )  # fmt: skip
    costs = profile_trace.op_costs(blocks)
    assert {name: cost.device for name, cost in costs.items()} == {"softmax": 0, "_softmax": 40, "copy_": 3}
    kernels = profile_trace.kernel_costs(blocks)
    assert {name: cost.total for name, cost in kernels.items()} == {"softmax_kernel": 40, "Memcpy DtoD": 3, "in a graph": 2}


def test_the_outermost_known_op_is_responsible():
    """``copy_`` nested in ``clone`` moves the clone's bytes."""
    host = [block("a", 0, 100), op("contiguous", 0, 20, 1), op("clone", 1, 18, 2), op("copy_", 5, 10, 3), op("copy_", 40, 6, 4)]
    assert profile_trace.time_within(read(*host), {"clone", "copy_"}) == {"clone": 18, "copy_": 6}
    device = [kernel("copy", 50, 30, identity=3), kernel("copy", 80, 7, identity=4)]
    assert profile_trace.time_within(read(*host, *device), {"clone", "copy_"}) == {"clone": 30, "copy_": 7}


def test_gaps_between_kernels():
    found = profile_trace.gaps([activity("c", 30, 5), activity("a", 0, 10), activity("b", 12, 3)])
    assert found == [Gap(15, "b", "c"), Gap(2, "a", "b")]


def test_streams_that_overlap_leave_no_gap():
    long, short = activity("long", 0, 100, stream=7), activity("short", 10, 5, stream=8)
    assert profile_trace.gaps([long, short, activity("next", 100, 5)]) == []
    assert profile_trace.gaps([long, short, activity("next", 110, 5)]) == [Gap(10, "long", "next")]
    assert profile_trace.union([long, short]) == 100


def test_kernels_of_no_length():
    zero = activity("zero", 20, 0)
    assert profile_trace.gaps([activity("a", 0, 10), zero, activity("b", 25, 5)]) == [Gap(10, "a", "zero"), Gap(5, "zero", "b")]
    assert profile_trace.union([zero]) == 0
    timeline = profile_trace.timeline(read(block("a", 0, 50), kernel("zero", 20, 0)))
    assert (timeline.window, timeline.busy, timeline.idle_share) == (0, 0, 0)


def test_the_timeline_leaves_out_what_is_between_blocks():
    timeline = profile_trace.timeline(
        read(
            block("a", 0, 50), kernel("k", 5, 10), kernel("memset", 20, 5, stream=8, cat="gpu_memset"), kernel("k", 40, 5),
            block("a", 1000, 50), kernel("k", 1005, 10), kernel("k", 1010, 10, stream=8),
            steps=2,
        )
    )  # fmt: skip
    assert timeline.window == (40 + 15) / 4
    assert timeline.busy == (20 + 15) / 4
    assert timeline.idle_share == pytest.approx(1 - 35 / 55)
    assert timeline.streams == 2
    assert timeline.gaps == [Gap(15, "memset", "k"), Gap(5, "k", "memset")]


def test_no_device_no_timeline():
    assert profile_trace.timeline(read(block("a", 0, 10), op("mm", 1, 2))) is None


def test_host_time_between_ops():
    blocks = read(
        block("a", 0, 100), op("linear", 10, 30), op("mm", 15, 10), op("backward", 50, 20, tid=2), op("wait", 60, 20),
        op("synchronise", 110, 50),
    )  # fmt: skip
    assert profile_trace.host(blocks) == (4, 20 + 10 + 20 + 20, 100 - 30 - 30)


def test_differences_have_what_either_side_has():
    rows = profile_trace.differences({"a": Cost(own=5), "b": Cost(own=1)}, {"b": Cost(own=9), "c": Cost(own=2)}, "own")
    assert [(name, ours.own - theirs.own) for name, ours, theirs in rows] == [("a", 5), ("c", -2), ("b", -8)]


def test_a_trace_of_something_else():
    with pytest.raises(ValueError, match=r"no annotation that starts with 'profiled: '"):
        read(op("mm", 0, 1))
