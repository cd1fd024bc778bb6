"""Tests of the table and pictures of the scaling curves, with made-up points."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import scaling_pictures, scaling_points

FACTS = {"device": "CPU 1", "torch": "2", "clock": "CPU time", "commit": "abc", "date": "2026-01-01"}
CENTRE = {"model": "ViT-X/16", "dtype": "float32", "K": 16, "L": 6, "B": 4, "S": 197}


def entry(provider, tax, axes=("K",), mode="training", spread=0.01, **sizes):
    """Return a pytest-benchmark record of a step of ``tax`` seconds."""
    info = FACTS | CENTRE | {
        "op": "scaling", "case": str(sizes), "mode": mode, "timing": "called", "provider": provider, "axes": list(axes),
        "calls_per_iteration": 1, "peak_memory": 2**20, "trained_parameters": 1000 * sizes.get("K", 16) * sizes.get("L", 6),
        "copy_bandwidth_gbps": 1.0, "peak_tflops": 1.0, "tax": tax, "tax_low": tax - spread, "tax_high": tax + spread,
    } | sizes  # fmt: skip
    return {"extra_info": info, "stats": {"median": tax, "q1": tax, "q3": tax}}


def document(*entries, skipped=()):
    return {"benchmarks": list(entries), "skipped": list(skipped)}


def curve(slope=1e-4):
    """Return records of mope_fast along K, the literal form, one longer prompt, and AdamW."""
    counts = (2, 16, 256)
    return [
        *(entry("mope_fast", 1.02 + slope * k, ("K", "length") if k == 2 else ("K",), K=k) for k in counts),
        *(entry("paper-literal", 1.1 + k / 50, K=k) for k in counts),
        *(entry("optimizer", 1e-3 * k, K=k) for k in counts),
        *(entry(name, 1.3, ("length",), K=2, L=34) for name in ("mope_fast", "vpt-deep")),
        *(entry("mope_fast", 1.05, ("K",), mode="inference", K=k) for k in counts),
    ]


def run(scaled="experts", experts=4, length=6, seed=0, accuracy=0.9, **facts):
    return FACTS | {
        "run": {"scaled": scaled, "experts": experts, "length": length, "seed": seed},
        "settings": {"training_questions": 100, "test_questions": 50, "epochs": 1, "batch_size": 32},
        "trained_parameters": 1000 * (1 + experts) * length, "test_accuracy": accuracy, "step_ms": 100.0, "constant_accuracy": 0.6,
    } | facts  # fmt: skip


RUNS = [
    run(experts=2, accuracy=0.7), run(experts=2, seed=1, accuracy=0.8), run(), run(seed=1, accuracy=0.95),
    run("length", 2, 10, accuracy=0.8), run("length", 2, 10, seed=1, accuracy=0.82),
]  # fmt: skip
SKIP = {"op": "scaling", "mode": "training", "timing": "called", "case": "K=1024", "provider": "paper-literal", "reason": "4 GiB"}


@pytest.fixture
def files(tmp_path):
    times, accuracy = tmp_path / "times.json", tmp_path / "accuracy.jsonl"
    times.write_text(json.dumps(document(*curve(), skipped=[SKIP])))
    accuracy.write_text("".join(json.dumps(each) + "\n" for each in RUNS))
    return [times, accuracy]


def test_the_table_has_every_point_and_what_was_not_measured(files):
    lines = list(csv.DictReader(io.StringIO(scaling_points.table(scaling_points.read(files)))))
    assert len(lines) == len(curve()) + len(RUNS) + 1
    longer = next(line for line in lines if line["provider"] == "vpt-deep")
    assert (longer["K"], longer["L"], longer["axes"], longer["tax"], longer["median_ms"]) == ("2", "34", "length", "1.3", "1300.0")
    accuracy = next(line for line in lines if line["scaled"] == "length" and line["seed"] == "1")
    assert (accuracy["kind"], accuracy["K"], accuracy["L"], accuracy["B"], accuracy["test_accuracy"]) == (
        "accuracy",
        "2",
        "10",
        "32",
        "0.82",
    )
    (left_out,) = [line for line in lines if line["not_measured"]]
    assert (left_out["case"], left_out["provider"], left_out["not_measured"]) == ("K=1024", "paper-literal", "4 GiB")


def test_other_groups_are_left_alone(tmp_path):
    other = entry("mope_fast", 1.0)
    other["extra_info"]["op"] = "end_to_end"
    (tmp_path / "other.json").write_text(json.dumps(document(other)))
    with pytest.raises(ValueError, match="no measurement of the group scaling"):
        scaling_points.read([tmp_path / "other.json"])


def test_curves_are_of_one_device(files):
    files[1].write_text(json.dumps(run(device="CPU 2")) + "\n")
    with pytest.raises(ValueError, match=r"curves are of one device.*CPU 1, CPU 2"):
        scaling_points.read(files)


def test_points_of_a_curve_are_in_order():
    rows = scaling_points.parse(document(*reversed(curve())))
    assert [row.info["K"] for row in scaling_points.on_axis(rows, "K", "mope_fast", "training", "called")] == [2, 16, 256]
    assert [row.info["L"] for row in scaling_points.on_axis(rows, "length", "mope_fast", "training", "called")] == [6, 34]


@pytest.mark.parametrize(("slope", "spread", "said"), [(5e-5, 0.001, "met"), (3e-4, 0.001, "missed"), (1e-4, 0.02, "level")])
def test_flat_in_k(slope, spread, said):
    entries = [entry("mope_fast", 1.02 + slope * k, spread=spread, K=k) for k in (16, 256)]
    (line,) = scaling_points.verdicts(scaling_points.parse(document(*entries)))
    assert line.startswith("ViT-X/16 B=4 training called: 16 -> 256 experts")
    assert line.endswith(said)
    assert scaling_points.verdicts(scaling_points.parse(document(entries[0]))) == []


def test_a_picture_for_every_curve(files, tmp_path, capsys):
    written = scaling_pictures.write(files, tmp_path / "out")
    assert {path.name for path in written} == {"points.csv", "k-vit-x-16.svg", "length-vit-x-16.svg", "accuracy.svg"}
    texts = {path.name: path.read_text() for path in written}
    for name, text in texts.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
    # matplotlib draws letters as paths and writes the text in a comment
    for words in ("experts K", "AdamW's step, apart", "paper-literal"):
        assert f"<!-- {words} -->" in texts["k-vit-x-16.svg"]
    assert "VPT-deep" not in texts["k-vit-x-16.svg"]
    for words in ("more experts, mope_fast", "longer prompts, mope_fast", "longer prompts, VPT-deep"):
        assert f"<!-- {words} -->" in texts["length-vit-x-16.svg"]
    assert "<!-- test accuracy, % -->" in texts["accuracy.svg"]
    assert "16 -> 256 experts" in capsys.readouterr().out


def test_the_same_points_give_the_same_files(files, tmp_path):
    one, other = (scaling_pictures.write(files, tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_seeds_are_averaged_and_span_the_band():
    places = scaling_pictures._over_seeds([each for each in RUNS if each["run"]["scaled"] == "experts"], "test_accuracy", 100)
    assert [place.x for place in places] == [18000, 30000]
    assert places[0][1:] == pytest.approx((75.0, 70.0, 80.0))


def test_a_file_without_points_is_said_in_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"no measurement.*empty\.jsonl"):
        scaling_pictures.main([str(tmp_path / "empty.jsonl"), "--output", str(tmp_path)])
