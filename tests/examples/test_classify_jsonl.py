"""The program on JSONL folders: kills lose nothing, other configurations and broken files are named, several processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mope_fast import MoPEFusion, Predictor, analysis

REASON = "needs the packages of the examples extra"
classify_jsonl = pytest.importorskip("classify_jsonl", reason=REASON)
training_run = pytest.importorskip("training_run", reason=REASON)
jsonl_task = pytest.importorskip("jsonl_task", reason=REASON)
tiny_task = pytest.importorskip("tiny_task", reason=REASON)
run_folder = pytest.importorskip("run_folder", reason=REASON)
accelerate = pytest.importorskip("accelerate", reason=REASON)

TINY = ["--experts=4", "--prompt-length=2", "--batch-size=8", "--epochs=2", "--lr=1e-2", "--checkpoint-every=2"]
HERE = Path(__file__).parent
PATHS = [str(folder) for folder in (HERE.parents[1] / "examples", HERE.parent / "models", HERE)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])}
START = """
import os, pathlib, tiny_task, classify_jsonl, jsonl_task
tiny_task.use_tiny_encoders(pathlib.Path(os.environ["TINY_CACHE"]))
jsonl_task.run_from_shell(classify_jsonl.main)
"""
KILLS = int(os.environ.get("MOPE_FAST_KILLS", "8"))


@pytest.fixture
def _tiny_encoders(monkeypatch, tmp_path):
    tiny_task.use_tiny_encoders(tmp_path, monkeypatch.setattr)


@pytest.fixture
def folder(tmp_path):
    return tiny_task.write_folder(tmp_path / "data")


def run(folder, output, *more):
    return classify_jsonl.main([str(folder), "--output", str(output), *TINY, *map(str, more)])


@pytest.mark.slow
@pytest.mark.timeout(1200 if KILLS > 8 else 300)
@pytest.mark.parametrize("complementary", ["prompted", "frozen"])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(folder, tmp_path, complementary):
    arguments = [str(folder), str(tmp_path / "out"), str(KILLS), "0", "--complementary", complementary]
    command = [sys.executable, str(HERE / "kill_and_resume.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["kills"] >= KILLS
    assert len(set(seen["steps"])) > 1


def stop(*arguments, **settings):
    raise KeyboardInterrupt


def partly(self, folder, **settings):
    Path(folder).mkdir()
    (Path(folder) / "optimizer.bin").write_bytes(b"half a fi")
    raise KeyboardInterrupt


@pytest.mark.usefixtures("_tiny_encoders")
@pytest.mark.parametrize(
    ("where", "name", "what"),
    [
        (accelerate.Accelerator, "save_state", partly),
        (Path, "rename", stop),
        (run_folder.RunFolder, "_remove", stop),
        (run_folder.shutil, "rmtree", stop),
        (run_folder.RunFolder, "keep_adapter", stop),
        (Predictor, "save_pretrained", stop),
        (MoPEFusion, "_save", stop),
        (training_run, "write_atomically", stop),
        (analysis.Recorder, "report", stop),
    ],
)
def test_stopped_at_the_worst_moments_it_ends_as_if_undisturbed(folder, tmp_path, monkeypatch, where, name, what):
    expected = run(folder, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, what)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "stopped")
    assert run(folder, tmp_path / "stopped", "--resume") == expected
    files = [
        sorted(str(path.relative_to(output)) for path in output.rglob("*") if "tfevents" not in path.name)
        for output in (tmp_path / "stopped", tmp_path / "undisturbed")
    ]
    assert files[0] == files[1]


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
    save, count = run_folder.RunFolder.save, []

    def stopped_behind_the_first(self, step):
        if count:
            raise KeyboardInterrupt
        count.append(step)
        save(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save", stopped_behind_the_first)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", "--epochs", 4, "--checkpoint-every", 15)
    assert count == [5]  # then steps 6 to 10 were done and lost
    time.sleep(1.1)  # files of events are in the order of their names, which begin with the second
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
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_test_split_without_labels_is_predicted(tmp_path, capsys, multi_label):
    folder = tiny_task.write_folder(tmp_path / "data", multi_label=multi_label)
    labelled = run(folder, tmp_path / "labelled", "--epochs", 1)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    (folder / "test.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("id", "text", "img")}) + "\n" for row in rows))
    results = run(folder, tmp_path / "out", "--epochs", 1)
    assert results == {name: value for name, value in labelled.items() if name != "test"}
    assert "test: no labels, so there are predictions but no metrics" in capsys.readouterr().out
    expected, got = (
        [json.loads(line) for line in (tmp_path / name / "predictions-test.jsonl").read_text().splitlines()]
        for name in ("labelled", "out")
    )
    assert got == [{**row, "label": None} for row in expected]
    assert "data:image/" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("_tiny_encoders")
def test_without_a_test_split_the_numbers_are_vals_and_it_says_so(folder, tmp_path, capsys):
    (folder / "test.jsonl").unlink()
    assert set(run(folder, tmp_path / "out", "--epochs", 1)) == {"samples", "best_epoch", "history", "val"}
    assert "there is no test split: the numbers are of val, by which the epoch was selected" in capsys.readouterr().out
    assert "Experts on val of data" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("_tiny_encoders")
def test_training_without_labels_is_refused_at_the_start(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    (folder / "val.jsonl").write_text("".join(json.dumps({**row, "label": None}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="val has no labels: train and val need a label in each line"):
        run(folder, tmp_path / "out")


@pytest.mark.usefixtures("_tiny_encoders")
def test_images_on_another_disk_are_let_in_by_name(folder, tmp_path):
    (folder / "images").rename(tmp_path / "disk")
    (folder / "images").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="outside of"):
        run(folder, tmp_path / "out")
    assert run(folder, tmp_path / "out", "--epochs", 1, "--outside", tmp_path / "disk")["samples"]["train"]["samples"] == 40


@pytest.mark.usefixtures("_tiny_encoders")
@pytest.mark.parametrize(
    "more", [["--main", "image"], ["--complementary", "frozen", "--head-epochs", "2"], ["--schedule", "steps", "--head-lr", "1e-2"]]
)
def test_other_forms(folder, tmp_path, more):
    assert set(run(folder, tmp_path / "out", *more)) == {"samples", "best_epoch", "history", "val", "test"}


@pytest.mark.usefixtures("_tiny_encoders")
def test_a_run_is_neither_overwritten_nor_mixed_with_another(folder, tmp_path, capsys):
    output = tmp_path / "out"
    first = run(folder, output)
    with pytest.raises(SystemExit):
        run(folder, output)
    assert "already has files: continue it by --resume, or give another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"has a run with other settings: experts was 4, now it is 5\. Give the same"):
        run(folder, output, "--experts", 5, "--resume")
    folder = folder.rename(folder.with_name("moved"))
    assert run(folder, output, "--workers", 1, "--resume") == first
    with open(folder / "train.jsonl", "a") as file:
        file.write("\n" + (folder / "train.jsonl").read_text().splitlines()[0])
    with pytest.raises(SystemExit, match=r"has a run with other settings: data was '\w+', now it is '\w+'"):
        run(folder, output, "--resume")


@pytest.mark.usefixtures("_tiny_encoders")
def test_images_that_went_make_it_another_configuration(folder, tmp_path):
    run(folder, tmp_path / "out", "--missing-images", "skip")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["samples"]["train"]["left out, without image"] == 0
    for i in range(3):
        (folder / "images" / f"train{i}.png").unlink()
    with pytest.raises(SystemExit, match="has a run with other settings: data was"):
        run(folder, tmp_path / "out", "--missing-images", "skip", "--resume")
    results = run(folder, tmp_path / "other", "--missing-images", "skip")
    assert results["samples"]["train"] == {"samples": 37, "left out, without image": 3, "with a grey picture": 0}
    results = run(folder, tmp_path / "grey", "--missing-images", "grey")
    assert results["samples"]["train"] == {"samples": 40, "left out, without image": 0, "with a grey picture": 3}
    with pytest.raises(ValueError, match="3 problems in"):
        run(folder, tmp_path / "error")


@pytest.mark.usefixtures("_tiny_encoders")
def test_a_mistake_at_the_start_does_not_claim_the_folder(folder, tmp_path):
    labels = (folder / "labels.txt").read_text()
    (folder / "labels.txt").write_text("rot\ngreen\nblue\n")
    with pytest.raises(ValueError, match=r"not in labels\.txt"):
        run(folder, tmp_path / "out")
    (folder / "labels.txt").write_text(labels)
    with pytest.raises(ValueError, match="dropout must be in"):
        run(folder, tmp_path / "out", "--dropout", 2)
    run(folder, tmp_path / "out")


@pytest.mark.usefixtures("_tiny_encoders")
def test_files_of_others_are_left_alone(folder, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / ".thesis.tex.part").write_text("mine")
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            run(folder, output, *more)
    assert "already has files" in capsys.readouterr().err
    (output / ".thesis.tex.part").unlink()
    run(folder, output, "--epochs", 1)
    others = [".thesis.tex.part", "step-1000", "adapter-epoch-final", "step-notes.txt"]
    for name in others:
        (output / name).mkdir()
    (output / "results.json").unlink()
    run(folder, output, "--epochs", 1, "--resume")
    assert all((output / name).exists() for name in others)


@pytest.mark.usefixtures("_tiny_encoders")
def test_a_folder_is_for_one_process_at_a_time(folder, tmp_path):
    run(folder, tmp_path / "out")
    with run_folder.FileLock(tmp_path / "out" / ".lock"), pytest.raises(SystemExit, match="another process is using"):
        run(folder, tmp_path / "out", "--resume")
    run(folder, tmp_path / "out", "--resume")


@pytest.mark.usefixtures("_tiny_encoders")
@pytest.mark.parametrize("file", ["optimizer.bin", "model.safetensors", "custom_checkpoint_0.pkl", "settings.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_damaged_checkpoint_is_named(folder, tmp_path, file, damage):
    run(folder, tmp_path / "out")
    (checkpoint,) = (tmp_path / "out").glob("step-*")
    path = (tmp_path / "out" if file == "settings.json" else checkpoint) / file
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    if damage == "gone":
        path.unlink()
    expected = rf"(?s){checkpoint} can't be read \(.*: restore it, or delete it to start from the beginning"
    if file == "settings.json":
        expected = "has files that are not a run of this program" if damage == "gone" else r"settings.json is damaged \("
    with pytest.raises(SystemExit, match=expected):
        run(folder, tmp_path / "out", "--resume")


@pytest.mark.usefixtures("_tiny_encoders")
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(folder, tmp_path, monkeypatch):
    step = training_run.Run._step

    def diverging(self, batch):
        if self.done == 6:
            with torch.no_grad():
                self.task.model.head.weight.fill_(float("nan"))
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.Run, "_step", diverging)
        with pytest.raises(ValueError, match=r"loss or gradients became NaN or infinite, at step 7 or shortly before"):
            run(folder, tmp_path / "out", "--checkpoint-every", 1)
    assert [path.name for path in (tmp_path / "out").glob("step-*")] == ["step-00000006"]
    assert run(folder, tmp_path / "out", "--checkpoint-every", 1, "--resume") == run(folder, tmp_path / "undisturbed")


@pytest.mark.usefixtures("_tiny_encoders")
def test_of_equally_good_epochs_the_first_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_task.Task, "metrics", lambda *arguments: {"accuracy": 0.5})
    assert run(folder, tmp_path / "out", "--epochs", 3)["best_epoch"] == 1


@pytest.mark.usefixtures("_tiny_encoders")
def test_gradients_are_clipped(folder, tmp_path, monkeypatch):
    norms, clip = [], accelerate.Accelerator.clip_grad_norm_

    def noted(self, parameters, largest):
        clip(self, parameters, largest)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item())
        return torch.zeros(())

    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", noted)
    run(folder, tmp_path / "out", "--clip", "1e-3")
    assert len(norms) == 10
    assert all(norm <= 1.001e-3 for norm in norms)


@pytest.mark.usefixtures("_tiny_encoders")
def test_all_images_can_be_read_beforehand(folder, tmp_path):
    for i in (3, 7):
        (folder / "images" / f"train{i}.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"2 of 40 images can't be read:\nthe image of post 3 .*\nthe image of post 7"):
        run(folder, tmp_path / "out", "--check-images")


def program(*arguments):
    """The program as a user starts it, but for the encoders."""
    command = [sys.executable, "-c", START, *map(str, arguments), *TINY]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env={**ENVIRONMENT, "TINY_CACHE": "."})


def test_what_is_wrong_is_one_line_and_no_traceback(folder, tmp_path):
    (folder / "val.jsonl").write_text('{"id": 1}\n')
    result = program(folder, "--output", tmp_path / "other")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "line 1: lacks 'text'" in result.stderr


@pytest.mark.usefixtures("_tiny_encoders")
def test_an_image_that_is_none_is_one_line(folder, tmp_path):
    (folder / "images" / "train3.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"^OSError: the image of post 3 can't be read"):
        jsonl_task.run_from_shell(lambda: run(folder, tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder is not a folder: expected one with train.jsonl"),
        ([".", "--lr", "nan"], "--lr must be a finite number >= 0, got nan"),
        ([".", "--clip", "0"], "--clip must be a finite number > 0, got 0.0"),
        ([".", "--head-lr=-1"], "--head-lr must be a finite number >= 0, got -1.0"),
        ([".", "--seed=-1"], "--seed must be 0 to 2**32 - 1, got -1"),
        ([".", "--image-size", "113"], "--image-size must be a multiple of 14, got 113"),
        ([".", "--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        ([".", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        ([".", "--output", __file__], "--output must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        classify_jsonl.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_joint_batch(folder, tmp_path):
    launcher = tmp_path / "launched.py"
    launcher.write_text(START)
    exact = ["--dropout=0", "--noise-std=0", "--mapper-norm=layer", "--importance-weight=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(launcher)]
    environment = {**ENVIRONMENT, "TINY_CACHE": str(tmp_path)}

    def start(command, output, *more):
        arguments = [str(folder), "--output", str(output), *TINY, *exact, *more]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=250, env=environment)

    output = tmp_path / "two"
    runs = [start(launch, output), start(launch, output, "--resume")]
    runs.append(start([sys.executable, str(launcher)], tmp_path / "one", "--batch-size=16"))
    assert [each.returncode for each in runs] == [0, 0, 0], "\n".join(each.stderr[-2000:] for each in runs)
    assert "resuming from" in runs[1].stdout
    assert json.loads((output / "settings.json").read_text())["processes"] == 2
    rows = [json.loads(line) for line in (output / "predictions-val.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    results = json.loads((output / "results.json").read_text())
    assert sum(row["label"] == row["predicted"] for row in rows) / 12 == pytest.approx(results["val"]["accuracy"])

    # 40 samples: two full joint batches of 16 an epoch
    two, one = (load_file(next(folder.glob("step-*/model.safetensors"))) for folder in (output, tmp_path / "one"))
    assert two.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
