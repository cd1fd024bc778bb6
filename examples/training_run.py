"""One training run of a task in an output folder. If it is killed at any moment, it can resume and end with the same result."""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from files import write_atomically
from jsonl_task import Task, default_device, to_device
from progress import Steps, tracked
from run_folder import RunFolder
from task_arguments import argument_parser, check, only_other
from torch import Tensor
from torch.utils.data import DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from mope_fast import analysis

MAY_CHANGE = (
    "folder", "outside", "images_in", "frames_in", "output", "resume", "workers", "checkpoint_every", "check_images", "debug",
)  # fmt: skip
"""Arguments that may differ in a resumed run."""


def run_parser(description: str, output: str, sets: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """Build the parser for a task on posts and its run, see :func:`argument_parser`."""
    return add_run(argument_parser(description, output, sets))


def add_run(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments of a run."""
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast dtype")
    parser.add_argument("--choose", choices=("best", "last"), default="best", help="epoch to test: the best on val, or the last")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints; also after each epoch")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output, if one exists")
    return parser


def check_run(parser: argparse.ArgumentParser, args: argparse.Namespace, **settings: Any) -> argparse.Namespace:
    """Check a run's arguments as well as those that :func:`check` checks."""
    args = check(parser, args, **settings)
    if args.checkpoint_every < 1:
        parser.error(f"--checkpoint-every must be at least 1, got {args.checkpoint_every}")
    return args


def settings_of(task: Task, processes: int) -> dict[str, Any]:
    """Return everything that a run's numbers depend on: arguments, number of processes, and a hash of the samples."""
    settings = {name: value for name, value in vars(task.args).items() if name not in MAY_CHANGE}
    return {"data": task.data_hash(), "processes": processes, **settings}


@dataclass
class Position:
    """Position and results of training, after ``step`` steps of ``epoch``."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0  # counted from 1
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics on val after each epoch."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Run:
    """One training run in an output folder."""

    def __init__(self, task: Task, accelerator: Accelerator):
        args = task.args
        self.task, self.args, self.accelerator, self.position = task, args, accelerator, Position()
        self.folder = RunFolder(args.output, accelerator)
        self.folder.claim(settings_of(task, accelerator.num_processes), args.resume)
        if not (args.resume and self.folder.has_checkpoint):
            task.fit_head()
        self.sampler = DistributedSampler(
            task.splits["train"], accelerator.num_processes, accelerator.process_index, seed=args.seed, drop_last=True
        )
        self.loader = task.loader("train", self.sampler)
        optimizer, self.schedule = task.optimizer(len(self.loader))
        task.model.leave_frozen_out_of_state_dict()
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        # prepared only once, because the accelerator keeps every loader that it has prepared
        self.judged = {name: accelerator.prepare_data_loader(task.loader(name)) for name in task.splits if name != "train"}
        if accelerator.num_processes > 1:
            task.model.use_joint_batch()
        self.trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        accelerator.register_for_checkpointing(self.position, self.schedule)
        if args.resume:
            self.folder.load()
        # sum of losses and gradient norms since the last check; not finite if one of them wasn't
        self.health = torch.zeros((), device=accelerator.device)
        # append-only: after a kill the last record may be truncated, which TensorBoard skips
        self.writer = SummaryWriter(args.output / "tensorboard", purge_step=self.done + 1) if accelerator.is_main_process else None

    @property
    def done(self) -> int:
        """Number of steps done."""
        return self.position.epoch * len(self.loader) + self.position.step

    def train(self) -> None:
        """Train from the current position to the end."""
        steps = self.args.epochs * len(self.loader)
        with Steps("training", steps, self.done, self.accelerator.is_main_process) as progress:
            while self.position.epoch < self.args.epochs:
                self.model.train()
                self.sampler.set_epoch(self.position.epoch)
                self.task.set_epoch(self.position.epoch)
                for batch in skip_first_batches(self.loader, self.position.step):
                    loss = self._step(to_device(batch, self.accelerator.device))
                    note = None
                    if self.done % 10 == 0:
                        self._check_health()
                        self._log({"train/loss": loss.item(), "train/lr": self.schedule.get_last_lr()[0]})
                        note = f"epoch {self.position.epoch + 1}/{self.args.epochs}, loss {loss.item():.3f}"
                    progress.reach(self.done, note)
                    if self.done % self.args.checkpoint_every == 0 and self.position.step < len(self.loader):
                        self._save()
                metrics = self._end_epoch()
                self.accelerator.print(f"val after epoch {self.position.epoch}: {readable(metrics)}")

    def _step(self, batch: dict[str, Any]) -> Tensor:
        accelerator = self.accelerator
        # seed dropout and routing noise
        torch.manual_seed((self.args.seed * 1_000_003 + self.done) * accelerator.num_processes + accelerator.process_index)
        loss = self.model(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.trained, self.args.clip)
        # in float16 a norm may be infinite: the gradient scaler skips such a step
        self.health += loss.detach() if self.args.precision == "fp16" else loss.detach() + norm
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.position.step += 1
        return loss.detach()

    def _check_health(self) -> None:
        if not math.isfinite(self.health.item()):
            raise ValueError(
                f"loss or gradients became NaN or infinite, at step {self.done} or shortly before: the last checkpoint is from "
                "before that; try a smaller --lr"
            )
        self.health.zero_()

    def _save(self) -> None:
        self._check_health()
        self.folder.save(self.done)

    def _end_epoch(self) -> dict[str, float]:
        self._check_health()
        position, chosen_by = self.position, self.task.chosen_by
        metrics = self.task.judge(self.outcomes("val"), "val")
        best = max((earlier[chosen_by] for earlier in position.history), default=float("-inf"))
        position.epoch, position.step = position.epoch + 1, 0
        position.history.append(metrics)
        if metrics[chosen_by] > best or self.args.choose == "last":
            position.best_epoch = position.epoch
            if self.accelerator.is_main_process:
                self.task.save(self.folder.adapter(position.epoch))
        self._log({f"val/{name}": value for name, value in metrics.items()})
        self.folder.save(self.done)
        self.folder.keep_adapter(position.best_epoch)
        return metrics

    def _log(self, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.done)

    @torch.inference_mode()
    def outcomes(self, split: str) -> Tensor:
        """Return what samples are evaluated by, such as logits, in the split's order."""
        self.model.eval()
        batches = tracked(self.judged[split], f"predicting {split}", self.accelerator.is_main_process)
        found = [self.accelerator.gather_for_metrics(self.task.outcomes(batch, self.model)) for batch in batches]
        return torch.cat(found).cpu()

    def finish(self) -> dict[str, Any]:
        """Write metrics, predictions and a report of the best epoch's adapter."""
        position = self.position
        self.accelerator.wait_for_everyone()
        self.folder.keep_adapter(position.best_epoch)
        self.task.model.load_pretrained(self.folder.adapter(position.best_epoch))
        results = {"samples": self.task.counts(), "best_epoch": position.best_epoch, "history": position.history}
        self.report(results)
        if list(self.judged) == ["val"]:
            self.accelerator.print("there is no test split: the numbers are of val, by which the epoch was selected")
        return results

    def report(self, results: dict[str, Any]) -> None:
        """Add metrics to the results, and write all output files."""
        for split in self.judged:
            with analysis.record(self.task.model, class_names=self.task.class_names) as recorder:
                logits = self.outcomes(split)
            posts = self.task.splits[split]
            if posts.labelled:
                results[split] = self.task.judge(logits, split)
                self.accelerator.print(f"{split}: {readable(results[split])}{_commonest(posts.labels)}")
            else:
                self.accelerator.print(f"{split}: no labels, so there are predictions but no metrics")
            self.write(split, results, logits)
        alone = self.accelerator.num_processes == 1
        if alone and len(self.args.other) > 1 and posts.labelled:
            effects = analysis.what_sides_add(self.task.model, self.judged[split])
            self.accelerator.print(f"{split}, without each side:\n{effects}")
            results[f"{split}, without each side"] = [row._asdict() for row in effects.rows]
            write_atomically(self.args.output / "results.json", json.dumps(results, indent=2))
        recorder = recorder if alone else recorder.gather()
        page = self.args.output / "report.html"
        if self.accelerator.is_main_process:
            title = f"Experts on {split} of {self.args.folder.resolve().name}"
            # with several processes, the recorder doesn't know which process had which sample
            recorder.report(page, samples=self.task.splits[split] if alone else None, title=title)
        self.accelerator.print(f"{page.with_name('results.json')}, {page}, {self.folder.adapter(self.position.best_epoch)}")

    def write(self, split: str, results: dict[str, Any], outcomes: Tensor) -> None:
        """Write a split's predictions, and the results so far."""
        if self.accelerator.is_main_process:
            lines = "".join(f"{json.dumps(row)}\n" for row in self.task.predictions(split, outcomes))
            write_atomically(self.args.output / f"predictions-{split}.jsonl", lines)
            write_atomically(self.args.output / "results.json", json.dumps(results, indent=2))


def _commonest(labels: Tensor) -> str:
    if labels.dim() == 2:
        return ""
    return f" (the most common class: {100 * labels.bincount().max().item() / len(labels):.1f} %)"


def readable(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in metrics.items())


def run(args: argparse.Namespace, load: Callable[[argparse.Namespace], Task], kind: type[Run] = Run) -> dict[str, Any]:
    """Train, evaluate and report; return the content of ``results.json``."""
    # without cpu=True the accelerator would not join the processes of a torchrun on a CPU
    settings = {"mixed_precision": args.precision, "cpu": default_device() == "cpu"}
    # if no sample of a process has a side, that side's trained parameters get no gradient in this process
    ddp = DistributedDataParallelKwargs(find_unused_parameters=only_other(args) is None)
    accelerator = Accelerator(**settings, kwargs_handlers=[ddp])
    this = kind(load(args), accelerator)
    for split, counts in this.task.counts().items():
        accelerator.print(f"{split}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))
    this.train()
    results = this.finish()
    if this.writer is not None:
        this.writer.close()
    accelerator.end_training()
    return results
