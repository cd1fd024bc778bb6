"""A plain loop, transformers' Trainer, Accelerate and Lightning train the same fusion to the same parameters."""

import json

import pytest
import torch
from safetensors.torch import load_file

NAMES = ("tiny_task", "jsonl_task", "task_arguments", "with_plain_loop", "with_trainer", "with_accelerate", "with_lightning")
tiny_task, jsonl_task, task_arguments, with_plain_loop, with_trainer, with_accelerate, with_lightning = (
    pytest.importorskip(name, reason="needs the packages of the examples extra") for name in NAMES
)

# one batch an epoch, nothing random: samples come in each tool's own order. No batch norm: the gradient of the bias before it is
# what rounding leaves of zero, and AdamW makes whole steps of that
ARGUMENTS = ["--experts=4", "--prompt-length=2", "--batch-size=12", "--epochs=4", "--lr=3e-3", "--clip=0.5"]
ARGUMENTS += ["--dropout=0", "--noise-std=0", "--mapper-norm=layer"]


@pytest.fixture(autouse=True)
def _tiny_encoders(monkeypatch, tmp_path):
    tiny_task.use_tiny_encoders(tmp_path, monkeypatch.setattr)


@pytest.fixture
def folder(tmp_path):
    return tiny_task.write_folder(tmp_path / "data", train=12)


def trained(main, folder, output, *more):
    """(parameters before, parameters after)"""
    arguments = [str(folder), "--output", str(output), *ARGUMENTS, *more]
    parser = task_arguments.argument_parser("", "")
    unused = ["--output", str(output.with_name("unused"))]
    start = jsonl_task.load_task(task_arguments.check(parser, parser.parse_args([str(folder), *unused, *ARGUMENTS])))
    main(arguments)
    described = json.loads((output / "adapter" / "mope_fast.json").read_text())
    return start.model.trained_state_dict(), load_file(output / "adapter" / described["weights"])


@pytest.mark.parametrize("tool", [with_trainer, with_accelerate, with_lightning])
def test_it_ends_with_the_parameters_of_a_plain_loop(folder, tmp_path, tool):
    before, expected = trained(with_plain_loop.main, folder, tmp_path / "plain")
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    _, got = trained(tool.main, folder, tmp_path / "tool")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tool", [with_trainer, with_lightning])
def test_a_stopped_run_goes_on_from_a_checkpoint_of_trained_parts_only(folder, tmp_path, tool, monkeypatch):
    _, expected = trained(tool.main, folder, tmp_path / "whole")
    evaluate, epochs = jsonl_task.Task.metrics, []

    def stopped_in_the_third_epoch(self, logits, labels):
        epochs.append(len(epochs))
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return evaluate(self, logits, labels)

    with monkeypatch.context() as patch:
        patch.setattr(jsonl_task.Task, "metrics", stopped_in_the_third_epoch)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trained(tool.main, folder, tmp_path / "stopped")
    files = [*tmp_path.glob("stopped/checkpoint-*/model.safetensors"), *tmp_path.glob("stopped/*.ckpt")]
    assert files
    keys = (
        load_file(files[0]) if files[0].suffix == ".safetensors" else torch.load(files[0], weights_only=False)["state_dict"]
    ).keys()
    assert keys
    assert not any("encoder" in key for key in keys)
    _, got = trained(tool.main, folder, tmp_path / "stopped", "--resume")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_trainers_checkpointing_and_logging_work(folder, tmp_path, monkeypatch):
    _, expected = trained(with_trainer.main, folder, tmp_path / "plain")
    arguments, models, run = with_trainer.TrainingArguments, [], with_trainer.make_trainer
    more = {"gradient_checkpointing": True, "report_to": "tensorboard"}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr(with_trainer, "TrainingArguments", lambda **settings: arguments(**{**settings, **more}))
    monkeypatch.setattr(with_trainer, "make_trainer", lambda task: models.append(task.model) or run(task))
    _, got = trained(with_trainer.main, folder, tmp_path / "checkpointing")
    assert models[0].main.gradient_checkpointing
    assert list((tmp_path / "logs").rglob("events.*"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tool", [with_plain_loop, with_trainer, with_accelerate, with_lightning])
def test_all_samples_of_val_are_judged_and_an_output_is_not_overwritten(folder, tmp_path, tool, monkeypatch, capsys):
    judged, metrics = [], jsonl_task.Task.metrics
    monkeypatch.setattr(jsonl_task.Task, "metrics", lambda self, *args: judged.append(len(args[0])) or metrics(self, *args))
    trained(tool.main, folder, tmp_path / "out", "--batch-size=8", "--epochs=1")
    assert set(judged) == {12}
    with pytest.raises(SystemExit):
        tool.main([str(folder), "--output", str(tmp_path / "out")])
    assert "already has files" in capsys.readouterr().err


def test_lightning_goes_on_with_this_run_and_no_other(folder, tmp_path):
    trained(with_lightning.main, folder, tmp_path / "out")
    with_lightning.main([str(folder), "--output", str(tmp_path / "out"), *ARGUMENTS, "--epochs=6", "--resume"])
    assert [path.name for path in (tmp_path / "out").glob("last*")] == ["last.ckpt"]
    assert torch.load(tmp_path / "out" / "last.ckpt", weights_only=False)["epoch"] == 5
