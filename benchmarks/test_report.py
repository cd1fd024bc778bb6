import dataclasses
import json

import pytest
import torch

from benchmarks import report
from benchmarks.cases import FULL
from benchmarks.cases import attention as attention_cases
from benchmarks.cases import window_attention as window_cases
from benchmarks.cases.attention import AttentionCase
from benchmarks.cases.end_to_end import BERT_B, SWIN_B, VIT_B, FusedCase
from benchmarks.cases.mope_baf import BAFCase
from benchmarks.cases.mope_baf import cases as baf_cases
from benchmarks.cases.route_and_mix import CUDA, Case
from benchmarks.cases.window_attention import WindowCase
from benchmarks.report import model, overview, text
from benchmarks.report.profiles import (
    END_TO_END,
    MOPE_BAF,
    PROFILES,
    PROMPT_ATTENTION,
    RECEPTIVE_FIELD_ATTENTION,
    ROUTE_AND_MIX,
    WINDOW_PROMPT_ATTENTION,
    over_eager,
    over_rivals,
)

PAPER, LARGE = CUDA[0], CUDA[5]


GPU = torch.device("cuda")
VIT = attention_cases.prompt_attention(GPU, FULL)[0]
VLMO = attention_cases.receptive_field_attention(GPU, FULL)[0]
SWIN_STAGE, *_, FIRST_LAYER = sorted(window_cases.cases(GPU, FULL), key=lambda case: case.first_layer)
FUSED, FUSED_BERT, FUSED_SWIN_B = (FusedCase(encoder, 64, torch.bfloat16) for encoder in (VIT_B, BERT_B, SWIN_B))
BAF = baf_cases(GPU, FULL)[0]


def entry(
    provider: str, microseconds: float, *, case: Case | AttentionCase | WindowCase = PAPER, mode: str = "forward+backward", **info
) -> dict:
    """Return a pytest-benchmark record of 10 calls per iteration on a made-up GPU with 4,000 GB/s and 1,000 TFLOP/s."""
    seconds = 10 * microseconds * 1e-6
    facts = {
        "device": "GPU 1", "device_type": "cuda", "cpu_threads": 2, "python": "3", "torch": "2", "triton": "3", "mope_fast": "0",
        "commit": "abc", "clock": "wall time", "date": "2026-01-01", "copy_bandwidth_gbps": 4000.0, "l2": "cold",
        "peak_tflops": 1000.0, "peak_dtype": "bfloat16", "peak_source": "datasheet", "implementation": "triton",
        "op": getattr(case, "op", "route_and_mix"),
        "mode": mode, "timing": "replay", "provider": provider, "calls_per_iteration": 10, "peak_memory": 2**21,
        "bytes": case.bytes(mode), "flops": case.flops(mode),
    }  # fmt: skip
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds}
    return {"extra_info": facts | case.describe() | info, "stats": stats}


def tax_entry(provider: str, tax: float, case: FusedCase | BAFCase = FUSED, mode: str = "training", **info) -> dict:
    """Return a record of ``tax`` ms, with a spread of 1 % over rounds and a memory tax of 1.5."""
    facts = {
        "device": "GPU 1", "device_type": "cuda", "cpu_threads": 2, "python": "3", "torch": "2", "triton": "3", "mope_fast": "0",
        "commit": "abc", "clock": "wall time", "date": "2026-01-01", "copy_bandwidth_gbps": 4000.0, "l2": "warm",
        "implementation": "prompt_attention triton", "op": "end_to_end", "mode": mode, "timing": "replay", "provider": provider,
        "calls_per_iteration": 1, "peak_memory": 3 * 2**20, "memory_tax": 1.5, "flops": 1,
        "tax": tax, "tax_low": 0.99 * tax, "tax_high": 1.01 * tax,
    }  # fmt: skip
    stats = {"median": tax * 1e-3, "q1": 0.99e-3 * tax, "q3": 1.01e-3 * tax}
    return {"extra_info": facts | case.describe() | info, "stats": stats}


def baf_entry(provider: str, tax: float, tokens: float = 1.25, **info) -> dict:
    """Return such a record of MoPE-BAF with 25 % more tokens."""
    return tax_entry(provider, tax, BAF, op="mope_baf", token_ratio=tokens, excess=tax / tokens, **info)


def rows(*entries: dict) -> list[model.Row]:
    return model.merge(model.parse({"benchmarks": list(entries)}))


def groups(*entries: dict, profile: model.Profile = ROUTE_AND_MIX) -> list[model.Group]:
    return model.group(rows(*entries), profile)


def goal_lines(profile: model.Profile, wanted: str, *entries: dict, device_type: str = "cuda") -> list[str]:
    lines = text.goal_lines(groups(*entries, profile=profile), profile, device_type)
    return [line for line in text.table(text.GOAL_HEADER, lines).splitlines() if wanted in line]


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
    (group,) = groups(entry("literal", 90.0), entry("matmul", 50.0), entry("matmul-compiled", 30.0), entry("mope_fast", 20.0))
    assert over_eager(group) == pytest.approx(2.5)
    assert model.speed(group, ["matmul-compiled"]) == pytest.approx(1.5)


@pytest.mark.parametrize(("ours", "answer"), [(19.9, "met"), (25.0, "missed by 20%")])
def test_goal_at_the_paper_size(ours, answer):
    line = goal_lines(ROUTE_AND_MIX, str(PAPER), entry("matmul", 50.0), entry("mope_fast", ours))[0]
    assert answer in line


def test_goal_for_bandwidth_uses_the_copy_of_the_session():
    perfect = LARGE.bytes("forward") / 4e12 * 1e6
    (line,) = goal_lines(ROUTE_AND_MIX, str(LARGE), entry("mope_fast", perfect / 0.9, case=LARGE, mode="forward"))
    assert "0.90" in line
    assert line.endswith("met |")


def test_goal_without_a_measurement_says_so():
    assert len(goal_lines(ROUTE_AND_MIX, "not measured", entry("mope_fast", 20.0))) == 5


def test_losses_name_the_winner_and_the_gap():
    (line,) = text.losses(groups(entry("matmul", 10.0), entry("mope_fast", 15.0)))
    assert "matmul eager takes 10.0 us, mope_fast 15.0 us (50% more)" in line
    assert text.losses(groups(entry("matmul", 20.0), entry("mope_fast", 15.0))) == []


def test_roofline_share_is_of_the_tighter_bound():
    floor = VIT.bytes("forward") / 4e12 * 1e6
    (row,) = rows(entry("auto", 2 * floor, case=VIT, mode="forward"))
    assert row.roofline_share == pytest.approx(0.5)
    (row,) = rows(entry("auto", 2 * floor, case=VIT, mode="forward", peak_tflops=VIT.flops("forward") / floor / 1e6 / 2))
    assert row.roofline_share == pytest.approx(1.0)
    (row,) = rows(entry("auto", 2 * floor, case=VIT, mode="forward", peak_dtype="float32"))
    assert row.roofline_share is None


def test_auto_is_not_compared_with_itself():
    entries = [entry("sdpa", 30.0, case=VIT), entry("triton", 19.0, case=VIT), entry("auto", 20.0, case=VIT)]
    (group,) = groups(*entries, profile=PROMPT_ATTENTION)
    assert over_rivals(group) == pytest.approx(1.5)
    assert text.losses([group]) == []
    (chose_sdpa,) = groups(
        *(e | {"extra_info": e["extra_info"] | {"implementation": "sdpa"}} for e in entries), profile=PROMPT_ATTENTION
    )
    assert over_rivals(chose_sdpa) == pytest.approx(0.95)
    (loss,) = text.losses([chose_sdpa])
    assert "mope_fast triton takes 19.0 us, mope_fast auto (sdpa) 20.0 us (5% more; the quartiles overlap)" in loss


def test_a_goal_for_all_sizes_is_one_line_about_the_worst():
    other = dataclasses.replace(VIT, batch=8)
    entries = [entry("sdpa", 30.0, case=VIT), entry("auto", 20.0, case=VIT), entry("sdpa", 30.0, case=other)]
    wanted = "| auto not slower than the best other | forward+backward, replay |"
    for ours, answer in (
        (29.0, "1.03 | met at all 2 |"),
        (31.0, "0.97 | met at 1, level at 1 |"),
        (60.0, "0.50 | met at 1, missed at 1; worst: missed by 50% |"),
    ):
        (line,) = goal_lines(PROMPT_ATTENTION, wanted, *entries, entry("auto", ours, case=other))
        assert line == f"{wanted} {other} | >= 1 | {answer}"


def test_goals_of_attention_sizes():
    perfect = VIT.bytes("forward") / 4e12 * 1e6
    (line,) = goal_lines(PROMPT_ATTENTION, "share of the roofline", entry("auto", perfect / 0.6, case=VIT, mode="forward"))
    assert "0.60" in line
    assert line.endswith("met |")
    lines = goal_lines(
        RECEPTIVE_FIELD_ATTENTION, "SDPA with a mask, VLMo", entry("sdpa-mask", 60.0, case=VLMO), entry("auto", 50.0, case=VLMO)
    )
    assert [line.split(" | ")[-1] for line in lines] == ["not measured |", "missed by 20% |"]


def test_goals_in_windows_are_about_swin_without_prompts_too():
    """A provider without prompts counts as a rival where it has gradients to compute."""
    others = [entry("timm", 40.0, case=SWIN_STAGE), entry("timm-eager", 90.0, case=SWIN_STAGE)]
    entries = [*others, entry("sdpa-concat", 60.0, case=SWIN_STAGE), entry("auto", 50.0, case=SWIN_STAGE)]
    first_layer = [entry("sdpa-concat", 60.0, case=FIRST_LAYER), entry("auto", 20.0, case=FIRST_LAYER)]
    lines = goal_lines(WINDOW_PROMPT_ATTENTION, "forward+backward, replay", *entries, *first_layer)
    assert [line.split(" | ", 4)[-1] for line in lines] == [
        "1.20 | met at all 2 |",
        "0.80 | missed at 1; worst: missed by 20% |",
        "1.80 | met at all 1 |",
    ]
    (loss,) = text.losses(groups(*entries, profile=WINDOW_PROMPT_ATTENTION))
    assert "timm on SDPA, no prompts takes 40.0 us" in loss


def test_memory_beside_sdpa():
    entries = [entry("sdpa", 30.0, case=VIT, timing="called"), entry("auto", 20.0, case=VIT, timing="called", peak_memory=2**20)]
    lines = goal_lines(PROMPT_ATTENTION, "memory", *entries)
    assert [line.split(" | ")[-2] for line in lines] == ["-", "2.00"]


def test_taxes_of_one_size_are_one_table():
    entries = [
        tax_entry("frozen", 1.0),
        tax_entry("mope_fast", 1.04),
        tax_entry("mope_fast", 1.2, timing="called", peak_memory=6 * 2**20, memory_tax=2.0),
        tax_entry("folded", 1.02, mode="inference"),
    ]
    lines = text.tax_table(groups(*entries, profile=END_TO_END), END_TO_END).splitlines()
    assert lines[0] == (
        "| provider | training, replay: time | ms | training, called: time | ms | training: memory (MiB) "
        "| inference: time | ms | inference: memory (MiB) |"
    )
    assert lines[3:] == [
        "| mope_fast | 1.040 (1.030 - 1.050) | 1.04 | 1.200 (1.188 - 1.212) | 1.2 | 1.50 (3) | - | - | - |",
        "| mope_fast folded | - | - | - | - | - | 1.020 (1.010 - 1.030) | 1.02 | 1.50 (3) |",
    ]


def test_repeated_runs_give_the_median_tax():
    (row,) = rows(tax_entry("mope_fast", 1.1), tax_entry("mope_fast", 1.0), tax_entry("mope_fast", 1.3))
    assert row.info["tax"] == 1.1
    assert row.info["tax_low"] == pytest.approx(1.089)


@pytest.mark.parametrize(("tax", "answer"), [(1.05, "met"), (1.059, "level (the spread reaches it)"), (1.26, "missed by 20.0%")])
def test_goals_from_above(tax, answer):
    (line,) = goal_lines(END_TO_END, f"training, replay | {FUSED} |", tax_entry("mope_fast", tax))
    assert line == f"| tax of mope_fast, ViT-B/16 B=64 | training, replay | {FUSED} | <= 1.05 | {tax:.3f} | {answer} |"


def test_losses_are_to_other_methods_not_to_the_frozen_encoder():
    entries = [tax_entry(name, tax) for name, tax in (("frozen", 1.0), ("lora", 1.02), ("mope_fast", 1.1), ("full", 1.5))]
    (line,) = text.losses(groups(*entries, profile=END_TO_END))
    assert line.endswith("LoRA r=8 takes 1.020 times as long as the frozen encoder, mope_fast 1.100 times")


def test_times_over_tokens_are_a_column():
    entries = [baf_entry("plain", 1.0, 1.0), baf_entry("mope_fast", 1.3)]
    lines = text.tax_table(groups(*entries, profile=MOPE_BAF), MOPE_BAF).splitlines()
    assert lines[0] == "| provider | tokens | training: time | ms | time / tokens | training: memory (MiB) |"
    assert lines[2:] == [
        "| plain VLMo | 1.000 | 1.000 (0.990 - 1.010) | 1 | 1.000 | 1.50 (3) |",
        "| mope_fast | 1.250 | 1.300 (1.287 - 1.313) | 1.3 | 1.040 | 1.50 (3) |",
    ]


@pytest.mark.parametrize(("tax", "answer"), [(1.2875, "met"), (1.295, "level (the spread reaches it)"), (1.545, "missed by 20.0%")])
def test_goals_about_time_over_tokens(tax, answer):
    (line,) = goal_lines(MOPE_BAF, f"training, replay | {BAF} | <= 1.03", baf_entry("mope_fast", tax))
    assert line.endswith(f"| {tax / 1.25:.3f} | {answer} |")


@pytest.mark.parametrize(
    ("restricted", "answer"),
    [(1.3, "1.000 | met at all 1"), (1.31, "1.008 | level at 1"), (1.43, "1.100 | missed at 1; worst: missed by 10.0%")],
)
def test_goals_about_restricted_fields(restricted, answer):
    (line,) = goal_lines(
        MOPE_BAF,
        "restricted over unrestricted fields | training, replay",
        baf_entry("mope_fast", restricted),
        baf_entry("unrestricted", 1.3),
    )
    assert line.endswith(f"| <= 1 | {answer} |")


@pytest.mark.parametrize(
    ("entries", "pictures", "line"),
    [
        (
            [
                tax_entry("frozen", 1.0),
                tax_entry("mope_fast", 1.04),
                tax_entry("frozen", 1.0, FUSED_BERT),
            ],
            ("taxes_training_replay.svg",),
            "| mope_fast | 1.040 (1.030 - 1.050) | 1.04 | 1.50 (3) |",
        ),
        (
            [tax_entry(name, tax, FUSED_SWIN_B) for name, tax in (("frozen", 1.0), ("frozen-sdpa", 0.8), ("mope_fast", 0.9))],
            ("taxes_training_replay.svg",),
            "| frozen encoder with SDPA | 0.800 (0.792 - 0.808) | 0.8 | 1.50 (3) |",
        ),
        (
            [baf_entry("plain", 1.0, 1.0), baf_entry("mope_fast", 1.3), baf_entry("mope_fast", 1.5, mode="inference")],
            ("taxes_training_replay.svg", "taxes_inference_replay.svg"),
            f"## {BAF}, inference",
        ),
        (
            [entry("timm", 40.0, case=SWIN_STAGE), entry("flex", 50.0, case=SWIN_STAGE), entry("auto", 20.0, case=SWIN_STAGE)],
            ("times_forward_backward_replay.svg", "speedup.svg", "speedup_timm.svg", "roofline_share.svg"),
            "| mope_fast auto (triton) | 20.0 | 18.0 - 22.0 | 2.00x |",
        ),
        (
            [entry("literal", 90.0), entry("matmul", 50.0), entry("mope_fast", 20.0)],
            ("times_forward_backward_replay.svg", "speedup.svg", "copy_share.svg"),
            "| mope_fast | 20.0 | 18.0 - 22.0 | 2.50x |",
        ),
        (
            [entry("sdpa-mask", 50.0, case=VIT), entry("flex", 40.0, case=VIT), entry("auto", 20.0, case=VIT)],
            ("times_forward_backward_replay.svg", "speedup.svg", "speedup_mask.svg", "roofline_share.svg"),
            "| mope_fast auto (triton) | 20.0 | 18.0 - 22.0 | 2.50x |",
        ),
    ],
)
def test_report_and_pictures_are_written(tmp_path, entries, pictures, line):
    source = tmp_path / "run.json"
    source.write_text(json.dumps({"benchmarks": entries}))
    written, page = report.write([source], tmp_path / "out")
    assert page == tmp_path / "out" / "REPORT.md"
    assert written == tmp_path / "out" / entries[0]["extra_info"]["op"] / "report.md"
    assert line in written.read_text()
    for picture in pictures:
        assert f"({picture})" in written.read_text()
        assert (written.parent / picture).stat().st_size > 0


def test_every_op_gets_a_report_with_its_own_skips(tmp_path):
    source = tmp_path / "run.json"
    entries = [entry("mope_fast", 20.0), entry("auto", 20.0, case=VIT), entry("auto", 20.0, case=VLMO)]
    skip = {
        "op": "prompt_attention", "mode": "forward", "timing": "called", "case": str(VIT), "provider": "flex", "reason": "no GPU",
    }  # fmt: skip
    source.write_text(json.dumps({"benchmarks": entries, "skipped": [skip, skip | {"mode": "forward+backward"}]}))
    mix, prompt, field, page = (path.read_text() for path in report.write([source], tmp_path / "out"))
    assert f"## Not measured\n\n- FlexAttention: no GPU ({VIT})\n" in prompt
    assert "Not measured" not in mix + field
    assert all(f"(./{op}/report.md)" in page for op in ("route_and_mix", "prompt_attention", "receptive_field_attention"))


def test_two_devices_are_refused(tmp_path):
    source = tmp_path / "run.json"
    source.write_text(json.dumps({"benchmarks": [entry("matmul", 50.0), entry("mope_fast", 20.0, device="GPU 2")]}))
    with pytest.raises(SystemExit, match="GPU 1, GPU 2"):
        report.write([source], tmp_path / "out")


def device(*entries: dict) -> overview.Device:
    by_op = {}
    for op in dict.fromkeys(each["extra_info"]["op"] for each in entries):
        profile = PROFILES[op]
        by_op[op] = groups(*(each for each in entries if each["extra_info"]["op"] == op), profile=profile)
    return overview.Device(rows(*entries), "results/gpu-1", by_op)


def test_the_page_has_taxes_goals_and_what_would_close_a_gap():
    goal = next(goal for goal in END_TO_END.goals if goal.text == "times the speed of paper-literal, ViT-B/16 B=16")
    small = FusedCase(VIT_B, 16, torch.bfloat16)

    def taxed(ours: float, literal: float) -> list[dict]:
        taxes = {"frozen": 1.0, "mope_fast": ours, "paper-literal": literal}
        return [tax_entry(name, tax, small, timing="called") for name, tax in taxes.items()]

    page = overview.page([device(*taxed(1.1, 1.65), entry("matmul", 50.0), entry("mope_fast", 20.0))])
    assert f"| {small}, as called | 1 | 1.650 | 1.100 |" in page
    assert f"| {small} | 1.50 | 1.50 |" in page
    assert "| 1.50 | missed by 25% |" in page
    assert goal.closing in page
    assert "No GPU has been measured" not in page
    assert "(results/gpu-1/route_and_mix/report.md) | forward+backward | in a CUDA graph | 1 | 2.50 | 2.50 | 2.50 |" in page
    assert goal.closing not in overview.page([device(*taxed(1.0, 4.0))])


def test_the_headline_is_of_the_batch_size_at_which_most_was_measured():
    entries = [
        tax_entry(name, tax, FusedCase(encoder, batch, torch.bfloat16), timing="called")
        for encoder in (VIT_B, BERT_B, SWIN_B)
        for batch, taxes in ((16, {"frozen": 1.0}), (64, {"frozen": 1.0, "mope_fast": 1.04, "full": 1.5}))
        for name, tax in taxes.items()
    ]
    table = overview.headline([device(*entries)])
    assert "| BERT-B | - | 1.040 |" in table
    document = "before\n<!-- from benchmarks/REPORT.md -->\nold\n<!-- end -->\nafter\n"
    assert overview.put(document, "new") == document.replace("old", "\nnew\n")
    with pytest.raises(ValueError, match="one pair of marks"):
        overview.put("no marks", "new")


def test_the_page_and_the_readme_are_of_the_results_kept():
    for path, content in report.pages(report.kept()).items():
        assert path.read_text() == content, f"{path.name} is not what `python -m benchmarks.report` writes"
