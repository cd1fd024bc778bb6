"""The few-shot example: what it cuts the questions into, what it draws, and that a stopped run goes on."""

import argparse
import json
import sys

import pytest
import torch

question_types = pytest.importorskip("question_types", reason="needs the packages of the examples extra")
few_shot_baf = pytest.importorskip("few_shot_baf", reason="needs the packages of the examples extra")


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what color is the triangle?", "what-color"),
        ("what shape does the image contain?", "what-shape"),
        ("what is the color of the shape?", "what-is"),
        ("what is the teal shape?", "what-is"),
        ("is there not a teal shape in the image?", None),
        ("does the image contain a circle?", None),
    ],
)
def test_types_of_questions(question, kind):
    assert question_types.type_of(question) == kind


def questions(kinds):
    nothing = torch.zeros(len(kinds), dtype=torch.long)
    return question_types.Questions(nothing, nothing, nothing, nothing, nothing, ["a", "b", "c"], torch.tensor(kinds))


def test_types_and_their_answers_are_balanced():
    # type 0 with answers 0 and 1, one of them rare; type 1 with answer 2 alone, rarer than both
    data = questions([0] * 900 + [1] * 90 + [5] * 10)
    drawn = torch.cat(list(few_shot_baf.balanced(data, 40, 500, torch.Generator().manual_seed(0))))
    shares = torch.bincount(data.kinds[drawn], minlength=6) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.25, 0, 0, 0, 0.5]), atol=0.02, rtol=0)


def test_moved_pictures_keep_their_size_and_colors():
    pictures = torch.rand(2, 3, question_types.SIZE, question_types.SIZE)
    moved = few_shot_baf.moved(pictures, torch.Generator().manual_seed(1))
    assert moved.shape == pictures.shape
    assert not torch.equal(moved, pictures)
    assert torch.isin(moved, pictures).all()


def arguments(folder, **settings):
    defaults = {"output": folder, "seeds": 2, "device": "cpu", "shots": 4, "held_out": "what-is"}
    return argparse.Namespace(**{**defaults, **settings})


def result(accuracy):
    return {"accuracy": accuracy, "f1_macro": accuracy / 2, "parameters": 10}


def fill(runs, seeds):
    for backbone in few_shot_baf.BACKBONES:
        for method in few_shot_baf.METHODS:
            for seed in range(seeds):
                runs.add(backbone, method, seed, result(0.5 + seed / 10))


def test_finished_runs_are_found_again_and_those_of_other_settings_are_not(tmp_path):
    runs = few_shot_baf.Runs(arguments(tmp_path))
    assert len(runs.missing(2)) == 2 * len(few_shot_baf.BACKBONES) * len(few_shot_baf.METHODS)
    runs.add("frozen", "no prompts", 1, result(0.5))
    again = few_shot_baf.Runs(arguments(tmp_path))
    assert again.of("frozen", "no prompts", 1) == result(0.5)
    assert len(again.missing(2)) == len(few_shot_baf.Runs(arguments(tmp_path / "empty")).missing(2)) - 1
    other = few_shot_baf.Runs(arguments(tmp_path, shots=8))
    assert ("frozen", "no prompts", 1) in other.missing(2)
    other.add("frozen", "no prompts", 0, result(0.6))
    assert few_shot_baf.Runs(arguments(tmp_path)).results == again.results


def test_a_run_that_is_killed_while_it_writes_loses_nothing(tmp_path, monkeypatch):
    runs = few_shot_baf.Runs(arguments(tmp_path))
    runs.add("frozen", "no prompts", 0, result(0.5))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(few_shot_baf.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.add("frozen", "no prompts", 1, result(0.6))
    assert json.loads(runs.file.read_text())["results"].keys() == {"frozen | no prompts | 0"}


def test_table_and_picture(tmp_path):
    args = arguments(tmp_path)
    runs = few_shot_baf.Runs(args)
    fill(runs, 2)
    table = few_shot_baf.table(runs, args)
    assert table.row_count == len(few_shot_baf.METHODS)
    assert "55.0 ± 7.1" in list(table.columns[1].cells)
    few_shot_baf.draw(runs, args, 0.2, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["shots", "seeds", "steps", "pretrain-steps", "test-samples", "workers"])
def test_nothing_to_do_is_refused(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["few_shot_baf.py", "--output", str(tmp_path), f"--{name}", "0"])
    with pytest.raises(SystemExit):
        few_shot_baf.parse_arguments()
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
