"""Train a fusion with Lightning, on a folder of JSON Lines; --resume continues from the last checkpoint.

python examples/with_lightning.py outputs/easy_vqa_jsonl --complementary frozen --epochs 3
"""

import lightning
import torch
from jsonl_task import Task, load_task, run_from_shell
from lightning.pytorch.callbacks import ModelCheckpoint
from task_arguments import argument_parser, check


class Fusion(lightning.LightningModule):
    """A fusion as a LightningModule."""

    def __init__(self, task: Task):
        super().__init__()
        self.task, self.model = task, task.model
        self.model.leave_frozen_out_of_state_dict()  # checkpoints hold only trained parameters
        self.predicted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        output = self.model(**batch)
        self.log_dict({"loss": output.loss, "importance_loss": output.importance_loss}, prog_bar=True)
        return output.loss

    def validation_step(self, batch: dict, index: int) -> None:
        self.predicted.append((self.model(**batch).logits, batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        logits, labels = (torch.cat(parts) for parts in zip(*self.predicted, strict=True))
        self.predicted.clear()
        self.log_dict(self.task.metrics(logits.float().cpu(), labels.cpu()), prog_bar=True)

    def configure_optimizers(self) -> dict:
        batches = self.trainer.estimated_stepping_batches // self.task.args.epochs
        optimizer, schedule = self.task.optimizer(batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: list[str] | None = None) -> Task:
    parser = argument_parser(__doc__.split("\n")[0], "with_lightning")
    parser.add_argument("--resume", action="store_true")
    task = load_task(check(parser, parser.parse_args(arguments)))
    task.fit_head()
    args = task.args
    lightning.seed_everything(args.seed)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=args.clip,
        callbacks=[ModelCheckpoint(args.output, save_last=True, enable_version_counter=False)],
        logger=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    last = args.output / "last.ckpt"
    trainer.fit(Fusion(task), task.loader("train"), task.loader("val"), ckpt_path=last if args.resume and last.exists() else None)
    print({name: float(value) for name, value in trainer.callback_metrics.items()})
    task.save(args.output / "adapter")
    return task


if __name__ == "__main__":
    run_from_shell(main)
