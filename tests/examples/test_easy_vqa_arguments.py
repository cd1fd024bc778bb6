"""The example's command line refuses what it can't do, before any download."""

import sys

import pytest
import torch

easy_vqa = pytest.importorskip("easy_vqa", reason="needs the packages of the examples extra")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--main", "image", "--method", "late-concat-mlp"],
            "--method late-concat-mlp prompts neither side: leave out --main image",
        ),
        (["--image-size", "64"], "--image-size must be a multiple of 14, got 64"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--samples", "1"], "--samples must be at least 2, got 1"),
        (["--balance", "-1"], "--balance must be a finite number >= 0, got -1.0"),
        (["--weight-decay", "nan"], "--weight-decay must be a finite number >= 0, got nan"),
        (["--device", "cuda:99"], "--device cuda:99 can't be used here"),
    ],
)
def test_a_setting_that_can_not_work_is_refused(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["easy_vqa.py", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        easy_vqa.parse_arguments()
    assert message in capsys.readouterr().err


def test_how_long_it_trains_depends_on_what_is_trained(monkeypatch, tmp_path):
    for arguments, epochs in (([], 2), (["--method", "text"], 15), (["--main", "image"], 3), (["--epochs", "7"], 7)):
        monkeypatch.setattr(sys, "argv", ["easy_vqa.py", "--output", str(tmp_path), *arguments])
        assert easy_vqa.parse_arguments().epochs == epochs


def test_balanced_epochs_hold_each_answer_to_a_question_about_as_often():
    data = easy_vqa.Questions(
        input_ids=torch.tensor([[1, 2]] * 1000 + [[3, 4]] * 30), lengths=torch.full((1030,), 2), images=torch.zeros(1030),
        image_inputs=torch.zeros(1, 1), answers=torch.tensor([0] * 900 + [1] * 100 + [2] * 30), image_first=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    everything = torch.cat(data.training_batches(64, generator))
    assert sorted(everything.tolist()) == list(range(1030))
    kept = data.answers[torch.cat(data.training_batches(64, generator, balance=2.0))].bincount()
    assert kept[1:].tolist() == [100, 30]
    assert 150 < kept[0] < 250
