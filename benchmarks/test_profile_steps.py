import gzip
import json

import pytest
import torch

from benchmarks import environment, profile_report, profile_steps
from benchmarks.baselines.encoders import FROZEN
from benchmarks.cases import route_and_mix
from benchmarks.profile_traffic import count_traffic, cpu_times, footprint
from mope_fast.ops.route_and_mix import route_and_mix_forward

DEVICE = environment.default_device()


def profiled(tmp_path, encoder, mode, provider):
    profile_steps.main([
        "--encoder", encoder, "--batch", "17", "--mode", mode, "--provider", provider,
        "--steps", "1", "--rounds", "2", "--smoke", "--output", str(tmp_path),
    ])  # fmt: skip
    name = environment.slug(f"{profile_steps.find_case(encoder, 17, DEVICE)} {mode} {provider}")
    trace = json.loads(gzip.decompress((tmp_path / f"{name}.trace.json.gz").read_bytes()))
    return json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / f"{name}.md").read_text(), trace


def test_a_profile_says_what_prompts_add(tmp_path, capsys):
    pytest.importorskip("timm")
    found, report, trace = profiled(tmp_path, "tiny ViT", "training", "mope_fast")
    assert report in capsys.readouterr().out
    assert "host_name" not in trace
    ours, frozen = found["runs"]["mope_fast"], found["runs"][FROZEN]
    assert ours["host"]["ops"] > frozen["host"]["ops"] > 100
    assert ours["step_us"] >= ours["host_us"] > 0
    # a router in each of two layers
    routed = "mope_fast::route_and_mix" if DEVICE.type == "cuda" else "aten::_softmax"
    assert (ours["ops"][routed]["calls"], routed in frozen["ops"]) == (2, False)
    assert ours["traffic"]["aten::native_layer_norm"]["gbps"] > 0
    added = sum(cost["calls"] for cost in ours["ops"].values()) - sum(cost["calls"] for cost in frozen["ops"].values())
    assert f"| **all** | +{added:.1f} |" in report
    if DEVICE.type == "cuda":
        assert ours["timeline"]["busy"] > 0
        assert "mope_fast, replay" in found["runs"]


def test_a_profile_of_what_is_folded(tmp_path):
    pytest.importorskip("transformers")
    found, report, _ = profiled(tmp_path, "tiny BERT", "inference", "folded")
    assert found["facts"]["against"] == FROZEN
    assert "tiny BERT B=17 S=9" in report.splitlines()[0]


def test_what_a_profile_of_a_gpu_reads_like():
    """Return made-up results; no number in them was measured."""
    cost = {"calls": 2.0, "total": 9.0, "own": 5.0, "device": 30.0}
    kernels = {"void at::gemm<a | b>(" + "int, " * 40 + ")": {"calls": 1.0, "total": 30.0, "own": 30.0, "device": 30.0}}
    run = {
        "step_us": 60.0, "host_us": 55.0, "profiled_us": 70.0, "ops": {"aten::mm": cost}, "kernels": kernels,
        "host": {"ops": 2.0, "in_ops": 5.0, "between_ops": 1.0},
        "timeline": {
            "window": 50.0, "busy": 30.0, "idle_share": 0.4, "streams": 1, "gap_count": 2.0,
            "gaps": [{"duration": 12.0, "before": "gemm", "after": "softmax"}],
        },
        "traffic": {"aten::add": {"calls": 1, "bytes": 3_000_000, "product": False, "us": 2.0, "gbps": 1500.0}},
    }  # fmt: skip
    replay = run | {"ops": {}, "host_us": 3.0, "traffic": None}
    facts = {"provider": "mope_fast", "against": "frozen", "case": "ViT", "mode": "training", "device": "GPU", "clock": "wall time"}
    facts |= {"torch": "2", "triton": "3", "cpu_threads": 1, "date": "-", "commit": "-", "rounds": 1, "steps": 1}
    facts["copy_bandwidth_gbps"] = 3000.0
    runs = {"mope_fast": run, "frozen": run, "mope_fast, replay": replay}
    report = profile_report.text({"facts": facts, "runs": runs, "not_captured": {"frozen": "RuntimeError: no"}})
    assert "- mope_fast: the device is busy for 30 us a step, the host for 55 us: **host-bound**." in report
    assert "- mope_fast, replay: the device is busy for 30 us a step, the host for 3 us: **device-bound**." in report
    assert "| `gemm` | `softmax` | 12.0 |" in report
    assert "| `aten::add` | 1 | 3.00 | 2.0 | 1500.0 | 50% |" in report
    assert "frozen was not captured in a graph: RuntimeError: no" in report
    assert all(len(line) < 250 for line in report.splitlines() if line.startswith("| `void"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "ViT"], "there is no encoder 'ViT', expected one of"),
        (["--encoder", "tiny ViT", "--provider", "checkpointed"], "there is no provider 'checkpointed' in inference"),
        (["--encoder", "tiny ViT", "--provider", "frozen"], "must differ"),
    ],
)
def test_what_can_not_be_profiled(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        profile_steps.main([*arguments, "--batch", "2", "--mode", "inference", "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", route_and_mix.TINY, ids=str)
def test_bytes_are_those_of_the_cases(case):
    logits = torch.randn(case.batch, case.experts)
    experts = torch.randn(case.experts, case.rows, case.width, dtype=case.dtype)
    gram = torch.randn(case.rows, case.experts, case.experts) if case.gram else None
    traffic = count_traffic(lambda: route_and_mix_forward(logits, experts, None, gram, 0.1, None, False, 1e-5, case.dtype))
    saved = 4 * case.batch * case.rows if case.gram else 0  # reciprocal norms, for backward
    assert {name: (moved.calls, moved.bytes) for name, moved in traffic.items()} == {
        "mope_fast::route_and_mix": (1, case.bytes("forward") + saved)
    }


def test_views_and_what_is_repeated_move_nothing():
    x, row = torch.randn(4, 6), torch.randn(6)
    assert footprint(row.expand(4, 6)) == row.nbytes
    assert footprint(torch.empty(0, 3).expand(5, 0, 3)) == 0

    def function():
        y = x.view(2, 12).transpose(0, 1)[:3].reshape(6)
        torch.empty(100)
        return y, x + row.expand(4, 6), x.clone().add_(x)

    traffic = count_traffic(function)
    assert traffic["aten::add"].bytes == 2 * x.nbytes + row.nbytes
    assert traffic["aten::add_"].bytes == 3 * x.nbytes
    assert traffic["aten::clone"].bytes == 2 * x.nbytes + 2 * 6 * 4  # reshape had to copy
    assert set(traffic) == {"aten::add", "aten::add_", "aten::clone"}


def test_what_a_tensor_is_made_like_is_not_read():
    x = torch.randn(4, 6)
    traffic = count_traffic(lambda: (x.new_zeros(2), torch.zeros_like(x), torch.empty(6).copy_(x[0])))
    assert {name: moved.bytes for name, moved in traffic.items()} == {
        "aten::new_zeros": 2 * 4, "aten::zeros_like": x.nbytes, "aten::copy_": 2 * 6 * 4,
    }  # fmt: skip


def test_cpu_time_is_of_ops_that_are_not_made_of_others():
    x, weight = torch.randn(300, 300), torch.randn(300, 300, requires_grad=True)
    calls = cpu_times(lambda: torch.nn.functional.linear(x, weight).sum().backward())
    assert [name for name, _ in calls].count("aten::mm") == 2
    assert "aten::linear" not in dict(calls)
    assert min(seconds for name, seconds in calls if name == "aten::mm") > max(s for name, s in calls if name == "aten::t")


def test_products_and_both_passes_are_counted():
    x, weight = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    traffic = count_traffic(lambda: torch.nn.functional.linear(x, weight).relu().sum().backward())
    assert traffic["aten::mm"].calls == 2
    assert traffic["aten::mm"].product
    assert not traffic["aten::relu"].product
    assert "aten::threshold_backward" in traffic


def test_inference_mode_hides_no_op():
    x, linear = torch.randn(4, 6), torch.nn.Linear(6, 3)

    def function():
        with torch.inference_mode():
            return linear(x)

    assert set(count_traffic(function)) == {"aten::addmm"}
