"""Train a fusion by transformers' Trainer, on a folder of JSON Lines; --resume continues from the last checkpoint.

python examples/with_trainer.py outputs/easy_vqa_jsonl --complementary frozen --epochs 3
"""

import torch
from jsonl_task import Task, load_task, run_from_shell
from task_arguments import argument_parser, check
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class FusionTrainer(Trainer):
    """A Trainer that evaluates on all samples; ``dataloader_drop_last`` is meant for training, but Trainer applies it to both."""

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(dataset, self.args.eval_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def make_trainer(task: Task) -> Trainer:
    args, train = task.args, task.splits["train"]
    batches = max(1, len(train) // args.batch_size)
    settings = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        dataloader_drop_last=len(train) > args.batch_size,
        dataloader_num_workers=args.workers,
        max_grad_norm=args.clip,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        seed=args.seed,
        remove_unused_columns=False,  # the collator needs all fields of a sample
        report_to="none",
    )

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task.metrics(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))

    task.model.leave_frozen_out_of_state_dict()  # checkpoints hold only trained parameters
    return FusionTrainer(
        task.model,
        settings,
        data_collator=task.collate,
        train_dataset=train,
        eval_dataset=task.splits["val"],
        compute_metrics=metrics,
        optimizers=task.optimizer(batches),
    )


def main(arguments: list[str] | None = None) -> Task:
    parser = argument_parser(__doc__.split("\n")[0], "with_trainer")
    parser.add_argument("--resume", action="store_true")
    task = load_task(check(parser, parser.parse_args(arguments)))
    task.fit_head()
    trainer = make_trainer(task)
    last = get_last_checkpoint(task.args.output) if task.args.resume and task.args.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    print(trainer.evaluate())
    task.save(task.args.output / "adapter")
    return task


if __name__ == "__main__":
    run_from_shell(main)
