"""Train a fusion by a plain PyTorch loop, on a folder of JSON Lines.

python examples/with_plain_loop.py outputs/easy_vqa_jsonl --complementary frozen --epochs 3
"""

import torch
from jsonl_task import Task, default_device, load_task, run_from_shell, to_device
from task_arguments import argument_parser, check
from torch import nn
from tqdm import tqdm


def train(task: Task, device: str) -> None:
    """Train for all epochs."""
    model = task.model.to(device)
    loader = task.loader("train")
    optimizer, schedule = task.optimizer(len(loader))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for epoch in range(task.args.epochs):
        model.train()  # the encoders stay in eval mode
        for batch in (bar := tqdm(loader, desc=f"epoch {epoch + 1}")):
            output = model(**to_device(batch, device))
            output.loss.backward()  # task loss and weighted importance loss
            nn.utils.clip_grad_norm_(trained, task.args.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if bar.n % 10 == 0:
                bar.set_postfix(loss=f"{output.loss.item():.3f}")


@torch.inference_mode()
def evaluate(task: Task, split: str, device: str) -> dict[str, float]:
    task.model.eval()
    outputs = [(task.model(**to_device(batch, device)).logits.cpu(), batch["labels"]) for batch in task.loader(split)]
    return task.metrics(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def main(arguments: list[str] | None = None) -> Task:
    parser = argument_parser(__doc__.split("\n")[0], "with_plain_loop")
    task = load_task(check(parser, parser.parse_args(arguments)))
    task.fit_head()
    device = default_device()
    train(task, device)
    print(evaluate(task, "val", device))
    task.save(task.args.output / "adapter")
    return task


if __name__ == "__main__":
    run_from_shell(main)
