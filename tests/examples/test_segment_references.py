"""References: pictures in squares and masks back out of them; whole runs on a folder and on RefCOCO's files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

REASON = "needs the packages of the examples extra"
segment_references = pytest.importorskip("segment_references", reason=REASON)
reference_task = pytest.importorskip("reference_task", reason=REASON)
jsonl_task = pytest.importorskip("jsonl_task", reason=REASON)
refcoco_files = pytest.importorskip("refcoco_files", reason=REASON)
tiny_folders = pytest.importorskip("tiny_folders")

SMALL = ["--experts=2", "--prompt-length=2", "--batch-size=2", "--epochs=2", "--checkpoint-every=2"]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    made = tiny_folders.write_encoders(tmp_path_factory.mktemp("tiny") / "encoders")
    return [word for name in ("--text-model", "--image-model") for word in (name, made[name])]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr(jsonl_task, "CACHE", tmp_path / "cache")


def write_folder(folder, splits=("train", "val", "test")):
    """Six things of each split: one half of a picture is white, and phrases tell which."""
    folder.mkdir()
    for split in splits:
        rows = []
        for i in range(6):
            mask = np.zeros((20, 30 + i), np.uint8)
            mask[:, : 15 if i % 2 else None] = 255
            for kind, value in (("picture", mask), ("mask", mask)):
                Image.fromarray(value).save(folder / f"{split}-{i}-{kind}.png")
            texts = [f"the {word} apple" for word in ("best", "longest")[: 1 + i % 2]]
            rows.append({"id": i, "texts": texts, "img": f"{split}-{i}-picture.png", "mask": f"{split}-{i}-mask.png"})
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run(folder, output, encoders, *more):
    return segment_references.main([str(folder), "--output", str(output), *encoders, *SMALL, *map(str, more)])


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (16, 16), (12, 100), (1, 1)])
def test_a_mask_comes_back_out_of_its_square(size):
    height, width = size
    square = reference_task.Square(64, size)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[height // 2 :, width // 3 :] = True
    made = square.mask(mask)
    assert made.shape == (64, 64)
    assert (made != reference_task.DOES_NOT_COUNT).sum() == square.inner[0] * square.inner[1]
    assert max(square.inner) == 64
    back = square.back(made.float() - 0.5)
    assert back.shape == size
    assert (back == mask).double().mean() > 0.97
    image = square.image(
        Image.new("RGB", (width, height), (255, 0, 0)), torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.5, 1.0, 1.0])
    )
    assert (image != 0).any(0).equal(made != reference_task.DOES_NOT_COUNT)
    assert image[:, 32, 32].tolist() == [1.0, -0.5, -0.5]


def test_an_epoch_has_one_phrase_of_each_and_the_same_again():
    references = tuple(reference_task.Reference(str(i), ("a", "b", "c"), None, None) for i in range(20))
    drawn = reference_task.Drawn(reference_task.References(references), seed=3)
    first = [drawn[i][1] for i in range(20)]
    drawn.epoch = 1
    second = [drawn[i][1] for i in range(20)]
    drawn.epoch = 0
    assert [drawn[i][1] for i in range(20)] == first != second
    assert set(first) == {"a", "b", "c"}


def test_a_folder_is_trained_on_judged_and_drawn(tmp_path, encoders, capsys):
    folder, output = write_folder(tmp_path / "set"), tmp_path / "out"
    results = run(folder, output, encoders, "--epochs", 3, "--lr", 1e-2)
    assert results["samples"]["train"] == {"objects": 6, "phrases": 9}
    assert len(results["history"]) == 3
    assert results["test"]["mean_iou"] > 0.55  # white is the object
    rows = [json.loads(line) for line in (output / "predictions-test.jsonl").read_text().splitlines()]
    assert [(row["id"], row["phrase"]) for row in rows[:3]] == [
        ("0", "the best apple"),
        ("1", "the best apple"),
        ("1", "the longest apple"),
    ]
    assert sum(row["iou"] for row in rows) / len(rows) == pytest.approx(results["test"]["mean_iou"], abs=1e-4)
    assert Image.open(output / "predictions.png").size[0] > 300
    assert json.loads((output / "results.json").read_text())["test"] == results["test"]
    assert "there is no test split" not in capsys.readouterr().out


def test_refcoco_is_trained_on_as_published(tmp_path, encoders, capsys):
    folder = refcoco_files.make_refcoco(tmp_path)
    results = run(folder, tmp_path / "out", encoders, "--set", "refcoco", "--paper")
    assert {"val", "testA", "testB"} <= set(results)
    out = capsys.readouterr().out
    assert "not as published: train: 2 samples are here, 42,404 by unc's split" in out
    assert "paper: " in out


def test_a_stopped_run_ends_as_if_undisturbed(tmp_path, encoders, monkeypatch):
    folder, step = write_folder(tmp_path / "set"), segment_references.Run._step
    expected = run(folder, tmp_path / "undisturbed", encoders)

    def stopped(self, batch):
        if self.done == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(segment_references.Run, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "stopped", encoders)
    assert run(folder, tmp_path / "stopped", encoders, "--resume") == expected
    weights = [load_file(next((tmp_path / each).glob("step-*/model.safetensors"))) for each in ("undisturbed", "stopped")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_the_optimizer_has_the_heads_parameters_in_the_order_of_every_process(tmp_path, encoders):
    folder = write_folder(tmp_path / "set")
    args = segment_references.parse_arguments([str(folder), "--output", str(tmp_path / "out"), *encoders, *SMALL])
    task = segment_references.load(args)
    optimizer, _ = task.optimizer(3)
    expected = [id(parameter) for parameter in task.model.head.parameters()]
    assert [id(parameter) for parameter in optimizer.param_groups[-1]["params"]] == expected
    assert not {id(parameter) for group in optimizer.param_groups[:-1] for parameter in group["params"]} & set(expected)


def test_what_can_not_be_trained_on_is_said(tmp_path, encoders, capsys):
    folder = write_folder(tmp_path / "set", splits=("train",))
    with pytest.raises(ValueError, match="has no val: training needs both, got"):
        run(folder, tmp_path / "out", encoders)
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", encoders, "--split-by", "umd")
    assert "are for a published set: add --set" in capsys.readouterr().err
    folder = write_folder(tmp_path / "other")
    Image.new("L", (5, 5)).save(folder / "train-3-mask.png")
    with pytest.raises(ValueError, match=r"reference 3: its mask is \(5, 5\), but its picture \(20, 33\) pixels"):
        run(folder, tmp_path / "out", encoders)
