"""The program on JSONL folders: kills lose nothing, other configurations and broken files are named, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mope_fast import MoPEFusion

REASON = "needs the packages of the examples extra"
classify_jsonl = pytest.importorskip("classify_jsonl", reason=REASON)
jsonl_task = pytest.importorskip("jsonl_task", reason=REASON)
tiny_task = pytest.importorskip("tiny_task", reason=REASON)

TINY = ["--experts=4", "--prompt-length=2", "--batch-size=8", "--epochs=2", "--lr=1e-2", "--checkpoint-every=2"]
HERE = Path(__file__).parent
PATHS = [str(folder) for folder in (HERE.parents[1] / "examples", HERE.parent / "models", HERE)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]), "ACCELERATE_USE_CPU": "1"}
START = "import tiny_task, classify_jsonl; tiny_task.use_tiny_encoders(); classify_jsonl.run_from_shell()"
KILLS = int(os.environ.get("MOPE_FAST_KILLS", "12"))


@pytest.fixture
def _tiny_encoders(monkeypatch):
    monkeypatch.setattr(jsonl_task, "text_encoder", tiny_task.text_encoder)
    monkeypatch.setattr(jsonl_task, "image_encoder", tiny_task.image_encoder)


@pytest.fixture
def folder(tmp_path):
    return tiny_task.write_folder(tmp_path / "data")


def run(folder, output, *more):
    return classify_jsonl.main([str(folder), "--output", str(output), *TINY, *map(str, more)])


@pytest.mark.timeout(1200 if KILLS > 12 else 300)
def test_killed_at_random_moments_it_ends_as_if_undisturbed(folder, tmp_path):
    program = HERE / "kill_and_resume.py"
    command = [sys.executable, str(program), str(folder), str(tmp_path / "out"), str(KILLS), "0"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["kills"] >= KILLS
    # kills came before, between and behind checkpoints
    assert len(set(seen["steps"])) > 3


@pytest.mark.usefixtures("_tiny_encoders")
def test_what_it_writes(folder, tmp_path):
    results = run(folder, tmp_path / "out", "--epochs", 12)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert len(results["history"]) == 12
    assert results["history"][results["best_epoch"] - 1] == results["val"]
    assert results["val"]["accuracy"] == max(metrics["accuracy"] for metrics in results["history"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions-test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(10)]
    assert sum(row["label"] == row["predicted"] for row in rows) / 10 == pytest.approx(results["test"]["accuracy"])
    assert all(row["predicted"] == tiny_task.NAMES[torch.tensor(row["scores"]).argmax()] for row in rows)

    report = (tmp_path / "out" / "report.html").read_text()
    assert "Experts on test of data" in report
    assert "data:image/" in report

    (adapter,) = (tmp_path / "out").glob("adapter-epoch-*")
    assert adapter.name == f"adapter-epoch-{results['best_epoch']}"
    encoders = tiny_task.text_encoder("", 0)[0], tiny_task.image_encoder("", 0)[0]
    model = MoPEFusion.from_pretrained(adapter, *encoders)
    task = jsonl_task.load_task(classify_jsonl.parse_arguments([str(folder), *TINY]))
    with torch.inference_mode():
        logits = model(**{k: v for k, v in task.collate(task.splits["test"]).items() if k != "labels"}).logits
    torch.testing.assert_close(logits.softmax(1), torch.tensor([row["scores"] for row in rows]), atol=1e-4, rtol=0)

    (checkpoint,) = (tmp_path / "out").glob("step-*")
    frozen = sum(p.numel() for p in model.main.encoder.parameters()) * 4
    assert (checkpoint / "model.safetensors").stat().st_size < frozen


@pytest.mark.usefixtures("_tiny_encoders")
def test_tensorboard_has_each_step_once_over_a_resume(folder, tmp_path, monkeypatch):
    save, count = classify_jsonl.Checkpoints.save, []

    def stopped_behind_the_first(self, step):
        if count:
            raise KeyboardInterrupt
        count.append(step)
        save(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(classify_jsonl.Checkpoints, "save", stopped_behind_the_first)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", "--epochs", 4, "--checkpoint-every", 15)
    assert count == [5]  # then steps 6 to 10 were done and lost
    run(folder, tmp_path / "out", "--epochs", 4, "--checkpoint-every", 15, "--resume")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20]
    assert [event.step for event in events.Scalars("val/accuracy")] == [5, 10, 15, 20]


@pytest.mark.usefixtures("_tiny_encoders")
def test_several_classes_a_sample(tmp_path):
    folder = tiny_task.write_folder(tmp_path / "data", multi_label=True)
    results = run(folder, tmp_path / "out")
    assert set(results["test"]) == {"accuracy", "f1_macro", "f1_micro"}
    row = json.loads((tmp_path / "out" / "predictions-test.jsonl").read_text().splitlines()[0])
    assert isinstance(row["label"], list)
    assert row["predicted"] == [name for name, score in zip(tiny_task.NAMES, row["scores"], strict=True) if score > 0.5]


@pytest.mark.usefixtures("_tiny_encoders")
@pytest.mark.parametrize("more", [["--main", "image"], ["--complementary", "frozen"], ["--schedule", "steps", "--head-lr", "1e-2"]])
def test_other_forms(folder, tmp_path, more):
    assert set(run(folder, tmp_path / "out", *more)) == {"best_epoch", "history", "val", "test"}


@pytest.mark.usefixtures("_tiny_encoders")
def test_a_run_is_neither_overwritten_nor_mixed_with_another(folder, tmp_path):
    output = tmp_path / "out"
    first = run(folder, output)
    with pytest.raises(SystemExit, match="has a run already: go on with it by --resume, or give another --output"):
        run(folder, output)
    with pytest.raises(SystemExit, match=r"of another configuration: experts was 4, now it is 5\. Give the same"):
        run(folder, output, "--experts", 5, "--resume")
    assert run(folder, output, "--workers", 1, "--resume") == first
    with open(folder / "train.jsonl", "a") as file:
        file.write("\n" + (folder / "train.jsonl").read_text().splitlines()[0])
    with pytest.raises(SystemExit, match=r"of another configuration: data was '\w+', now it is '\w+'"):
        run(folder, output, "--resume")


def program(*arguments):
    """The program as a user starts it, but for the encoders."""
    command = [sys.executable, "-c", START, *map(str, arguments), *TINY]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)


def test_what_is_wrong_is_one_line_and_no_traceback(folder, tmp_path):
    (folder / "images" / "train3.png").write_bytes(b"no picture")
    result = program(folder, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "OSError: the image of post 3 can't be read" in result.stderr
    (folder / "val.jsonl").write_text('{"id": 1}\n')
    result = program(folder, "--output", tmp_path / "other")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "line 1: lacks 'text', 'label'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder is no folder: expected one with train.jsonl"),
        ([".", "--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        ([".", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        ([".", "--output", __file__], "--output must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        classify_jsonl.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_two_processes(folder, tmp_path):
    launcher = tmp_path / "launched.py"
    launcher.write_text(START)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(launcher), str(folder)]
    output = tmp_path / "out"
    runs = [
        subprocess.run(
            [*command, "--output", str(output), *TINY, *more], capture_output=True, text=True, timeout=250, env=ENVIRONMENT
        )
        for more in ([], ["--resume"])
    ]
    assert [each.returncode for each in runs] == [0, 0], runs[0].stderr[-3000:] + runs[1].stderr[-3000:]
    assert json.loads((output / "settings.json").read_text())["processes"] == 2
    rows = [json.loads(line) for line in (output / "predictions-val.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    results = json.loads((output / "results.json").read_text())
    assert sum(row["label"] == row["predicted"] for row in rows) / 12 == pytest.approx(results["val"]["accuracy"])
    assert "goes on from" in runs[1].stdout
