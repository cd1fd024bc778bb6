"""Train a fusion with Accelerate, in one process or several, on a folder of JSON Lines.

python examples/with_accelerate.py outputs/easy_vqa_jsonl --complementary frozen --epochs 3
torchrun --nproc-per-node 2 examples/with_accelerate.py outputs/easy_vqa_jsonl --complementary frozen --epochs 3
"""

import torch
from accelerate import Accelerator
from jsonl_task import Task, default_device, load_task, run_from_shell
from task_arguments import argument_parser, check
from tqdm import tqdm


def train(task: Task, accelerator: Accelerator) -> torch.nn.Module:
    """Train for all epochs; return the prepared model."""
    loader = task.loader("train")
    optimizer, schedule = task.optimizer(len(loader) // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(task.model, optimizer, loader)
    if accelerator.num_processes > 1:
        task.model.use_joint_batch()  # the loss is that of the samples of all processes together
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for epoch in range(task.args.epochs):
        model.train()
        for batch in tqdm(loader, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(trained, task.args.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


@torch.inference_mode()
def evaluate(task: Task, split: str, model: torch.nn.Module, accelerator: Accelerator) -> dict[str, float]:
    model.eval()
    outputs = []
    for batch in accelerator.prepare_data_loader(task.loader(split)):
        outputs.append(accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])))
    return task.metrics(*(torch.cat(parts).cpu() for parts in zip(*outputs, strict=True)))


def main(arguments: list[str] | None = None) -> Task:
    parser = argument_parser(__doc__.split("\n")[0], "with_accelerate")
    args = check(parser, parser.parse_args(arguments))
    task = load_task(args)
    task.fit_head()
    accelerator = Accelerator(cpu=default_device() == "cpu")
    torch.manual_seed(args.seed + accelerator.process_index)  # each process draws its own dropout and noise
    model = train(task, accelerator)
    metrics = evaluate(task, "val", model, accelerator)
    accelerator.print(metrics)
    if accelerator.is_main_process:
        task.save(task.args.output / "adapter")
    accelerator.end_training()
    return task


if __name__ == "__main__":
    run_from_shell(main)
