"""Tests of the sweep over Easy-VQA, without its data: what is run, what is kept, what is run again."""

import dataclasses
import json

import pytest
import torch

from benchmarks import scaling_accuracy
from benchmarks.scaling_accuracy import Run


@dataclasses.dataclass
class Questions:
    input_ids: torch.Tensor
    lengths: torch.Tensor
    images: torch.Tensor
    answers: torch.Tensor

    def __len__(self):
        return len(self.answers)


def questions(count):
    each = torch.arange(count)
    return Questions(each[:, None] % 3, each, each, each % 2)


def measured(run):
    return {"trained_parameters": 1, "test_accuracy": run.seed / 2, "step_ms": 1.0}


def test_a_sweep_goes_seed_by_seed_and_runs_no_model_twice():
    runs = list(scaling_accuracy.planned([2, 4], 6, [0, 1]))
    first = [Run("experts", 2, 6, 0), Run("experts", 4, 6, 0), Run("length", 2, 10, 0)]
    assert runs == first + [dataclasses.replace(run, seed=1) for run in first]


def test_a_sweep_that_was_stopped_goes_on(tmp_path):
    runs, output, done = list(scaling_accuracy.planned([2, 4], 6, [0])), tmp_path / "runs.jsonl", []

    def stops_at_two(run):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run)
        return measured(run)

    with pytest.raises(KeyboardInterrupt):
        scaling_accuracy.sweep(runs, {"epochs": 1}, output, stops_at_two, {"device": "CPU 1"})
    assert len(scaling_accuracy.load(output)) == 2
    again = []
    scaling_accuracy.sweep(runs, {"epochs": 1}, output, lambda run: again.append(run) or measured(run), {"device": "CPU 1"})
    assert again == runs[2:]
    assert [row["run"] for row in scaling_accuracy.load(output)] == [dataclasses.asdict(run) for run in runs]


def test_two_processes_share_a_sweep(tmp_path):
    runs, output, second = list(scaling_accuracy.planned([2, 4], 6, [0])), tmp_path / "runs.jsonl", []

    def overtaken(run):
        """During the first run, another process finishes the second."""
        if run == runs[0]:
            scaling_accuracy.sweep(runs[1:2], {}, output, lambda other: second.append(other) or measured(other), {})
        return measured(run)

    scaling_accuracy.sweep(runs, {}, output, overtaken, {})
    assert second == [runs[1]]
    assert [row["run"] for row in scaling_accuracy.load(output)] == [dataclasses.asdict(runs[i]) for i in (1, 0, 2)]


def test_other_settings_are_other_runs(tmp_path):
    runs, output = [Run("experts", 2, 6, 0)], tmp_path / "runs.jsonl"
    for epochs in (1, 2):
        scaling_accuracy.sweep(runs, {"epochs": epochs}, output, measured, {})
    assert [row["settings"]["epochs"] for row in scaling_accuracy.load(output)] == [1, 2]


@pytest.mark.parametrize("line", ["not json", "[]", json.dumps({"run": {}})])
def test_a_line_that_is_no_run_is_named(tmp_path, line):
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1 is not a run"):
        scaling_accuracy.load(tmp_path / "runs.jsonl")


def test_a_subset_is_the_same_every_time_and_keeps_questions_together():
    data = questions(100)
    one, other = (scaling_accuracy.subset(data, 10) for _ in range(2))
    assert torch.equal(one.images, other.images)
    assert len(set(one.images.tolist())) == 10
    assert torch.equal(one.answers, one.images % 2)
    assert torch.equal(one.input_ids[:, 0], one.images % 3)
    assert scaling_accuracy.subset(data, None) is data


def test_constant_answers():
    ids, answers = torch.tensor([[1, 2], [1, 2], [1, 2], [3, 0]]), torch.tensor([0, 0, 1, 1])
    data = Questions(ids, torch.full((4,), 2), torch.arange(4), answers)
    assert scaling_accuracy.constant_accuracy(data) == 0.75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "4"], "don't divide among 3"),
        (["--experts", "0"], "--experts must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        scaling_accuracy.parse_arguments(words)
    assert message in capsys.readouterr().err
