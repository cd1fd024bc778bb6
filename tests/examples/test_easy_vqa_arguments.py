"""The example's command line refuses what it can't do, before any download."""

import sys

import pytest

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
        (["--device", "cuda:99"], "--device cuda:99 can't be used here"),
    ],
)
def test_a_setting_that_can_not_work_is_refused(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["easy_vqa.py", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        easy_vqa.parse_arguments()
    assert message in capsys.readouterr().err


def test_frozen_features_train_longer(monkeypatch, tmp_path):
    for arguments, epochs in (([], 3), (["--method", "text"], 15), (["--main", "image"], 3), (["--epochs", "7"], 7)):
        monkeypatch.setattr(sys, "argv", ["easy_vqa.py", "--output", str(tmp_path), *arguments])
        assert easy_vqa.parse_arguments().epochs == epochs
