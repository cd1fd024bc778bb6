"""Accuracy on Easy-VQA of more experts or longer prompts, at equal trained parameters. ``python -m benchmarks.scaling_accuracy``.

Trains the fused model of ``examples/easy_vqa.py``, text as main, once for each number of experts K at prompt length L, and once for
two experts of the length with the same number of parameters; seed after seed. A finished run is written to the output file at once
and isn't run again: the same command continues where it was stopped. By default it is a small study: part of the questions, one
epoch.
"""

import argparse
import dataclasses
import datetime
import functools
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, measure
from benchmarks.cases.scaling import LENGTH_EXPERTS, equal_length
from benchmarks.examples import example
from mope_fast._files import write_atomically

SUBSET_SEED = 0
"""Seed that draws the subset of questions, the same for all runs."""


@dataclass(frozen=True)
class Run:
    """One model: ``experts`` of ``length`` tokens; ``scaled`` says which of the two was scaled up from 2 experts."""

    scaled: str
    experts: int
    length: int
    seed: int


def planned(experts: Iterable[int], length: int, seeds: Iterable[int]) -> Iterator[Run]:
    """Yield runs seed by seed, so that an interrupted sweep has whole seeds; a model that both ways share is run once."""
    for seed in seeds:
        for count in experts:
            yield Run("experts", count, length, seed)
            if count != LENGTH_EXPERTS:
                yield Run("length", LENGTH_EXPERTS, equal_length(count, length), seed)


def subset(data: Any, count: int | None) -> Any:
    """Return ``count`` of a split's questions, drawn once for all runs; None for all, in their order."""
    if count is None or count >= len(data):
        return data
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(SUBSET_SEED))[:count]
    on_device = index.to(data.answers.device)
    return dataclasses.replace(
        data, input_ids=data.input_ids[on_device], lengths=data.lengths[index], images=data.images[on_device],
        answers=data.answers[on_device],
    )  # fmt: skip


def constant_accuracy(data: Any) -> float:
    """Return the accuracy of always giving each question's most common answer in this data, which needs no image."""
    _, groups = data.input_ids.unique(dim=0, return_inverse=True)
    counts = torch.zeros(int(groups.max()) + 1, int(data.answers.max()) + 1)
    counts.index_put_((groups.cpu(), data.answers.cpu()), torch.ones(len(data)), accumulate=True)
    return (counts.amax(1).sum() / len(data)).item()


def train_and_test(run: Run, args: Namespace, train: Any, test: Any, classes: int) -> dict[str, Any]:
    """Do one run and return its results; a step is forward, backward and optimizer."""
    easy_vqa = example("easy_vqa")
    args = Namespace(**{**vars(args), "experts": run.experts, "prompt_length": run.length, "seed": run.seed})
    torch.manual_seed(run.seed)
    model = easy_vqa.build(args, train.image_inputs.shape[1], classes).to(args.device)
    start = measure.synchronised_time()
    easy_vqa.train(model, train, args)
    seconds = measure.synchronised_time() - start
    steps = args.epochs * -(-len(train) // args.batch_size)
    batches = test.batches(256)
    logits = torch.cat(easy_vqa.predict(model, test, batches, args))
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "test_accuracy": (logits.argmax(-1) == test.answers.cpu()[torch.cat(batches)]).double().mean().item(),
        "step_ms": seconds / steps * 1e3,
    }


def load(path: Path) -> list[dict[str, Any]]:
    """Read the runs of a file, one per line.

    Raises:
        ValueError: a line is not a run; the message says which.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            if not {"run", "settings", "test_accuracy", "trained_parameters", "step_ms"} <= row.keys():
                raise ValueError(f"it has {sorted(row)}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is not a run of benchmarks.scaling_accuracy: {error}") from error
        rows.append(row)
    return rows


def sweep(
    runs: Sequence[Run],
    settings: dict[str, Any],
    output: Path,
    measured: Callable[[Run], dict[str, Any]],
    facts: dict[str, Any],
) -> None:
    """Do the runs that are not in ``output`` with these settings yet; add to it what ``measured`` returns, and the ``facts``."""
    todo = [run for run in runs if not _is_done(run, settings, output)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are already in {output}")
    for number, run in enumerate(todo, start=1):
        if _is_done(run, settings, output):  # another process was faster
            continue
        print(f"run {number} of {len(todo)}: {run.experts} experts of {run.length} tokens, seed {run.seed}", flush=True)
        row = {"run": dataclasses.asdict(run), "settings": settings, **facts, **measured(run)}
        rows = [*_finished(output), row]
        write_atomically(output, "".join(json.dumps(each) + "\n" for each in rows).encode())
        print(f"  test accuracy {row['test_accuracy']:.4f}, {row['step_ms']:.0f} ms per step", flush=True)


def _finished(output: Path) -> list[dict[str, Any]]:
    return load(output) if output.exists() else []


def _is_done(run: Run, settings: dict[str, Any], output: Path) -> bool:
    return any(row["run"] == dataclasses.asdict(run) and row["settings"] == settings for row in _finished(output))


def parse_arguments(words: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="benchmarks.scaling_accuracy",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/scaling-accuracy.jsonl"), help="one line per finished run")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32], metavar="K")
    parser.add_argument("--length", type=int, default=6, metavar="L", help="prompt length when scaling experts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--samples", type=int, default=12000, help="training questions, drawn once; all are 38,575")
    parser.add_argument("--test-samples", type=int, default=4000, help="test questions, drawn once; all are 9,673")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=70, help="pixels, a multiple of 14")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time instead of wall time")
    parser.add_argument("--smoke", action="store_true", help="only check that it runs, with minimal settings")
    args = parser.parse_args(words)
    if args.smoke:
        args.experts, args.seeds, args.samples, args.test_samples, args.image_size = [2, 4], [0], 64, 64, 14
    for name in ("length", "samples", "test_samples", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if min(args.experts) < 1:
        parser.error(f"--experts must be at least 1, got {min(args.experts)}")
    try:
        list(planned(args.experts, args.length, args.seeds))
    except ValueError as error:
        parser.error(str(error))
    if args.cpu_time and torch.cuda.is_available():
        parser.error("--cpu-time doesn't include GPU time: hide the GPU (CUDA_VISIBLE_DEVICES=) or drop the option")
    return args


def main(words: Sequence[str] | None = None) -> None:
    args = parse_arguments(words)
    if args.cpu_time:
        measure.count_cpu_time()
    easy_vqa = example("easy_vqa")
    options = easy_vqa.parse_arguments(["--epochs", str(args.epochs), "--image-size", str(args.image_size), "--balance", "0"])
    train, test, names = easy_vqa.load_data(options)
    train, test = subset(train, args.samples), subset(test, args.test_samples)
    settings = {
        "training_questions": len(train), "test_questions": len(test), "epochs": args.epochs, "batch_size": options.batch_size,
        "lr": options.lr, "head_lr": options.head_lr, "weight_decay": options.weight_decay, "image_size": args.image_size,
    }  # fmt: skip
    facts = {
        **environment.describe(environment.default_device()), "commit": environment.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "clock": "CPU time" if args.cpu_time else "wall time", "constant_accuracy": constant_accuracy(test),
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    measured = functools.partial(train_and_test, args=options, train=train, test=test, classes=len(names))
    sweep(list(planned(args.experts, args.length, args.seeds)), settings, args.output, measured, facts)


if __name__ == "__main__":
    main()
