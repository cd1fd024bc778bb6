"""Segment what a phrase refers to: "the red circle" among four colored shapes, by prompts routed by the phrase in a frozen ViT.

    python examples/refer.py                   # every method once
    python examples/refer.py --seeds 5         # means and standard deviations
    python examples/refer.py --smoke           # a few seconds: does it run?

The pictures are mosaics of four published Easy-VQA pictures. The ViT-S/14 and MiniLM, whose feature of the phrase is computed once,
come from packages. One other shape has the named one's color and one has its form, so neither word alone identifies it. Methods:
all shapes, without a phrase; the mean mask of each phrase, without the picture; prompts without the phrase; the phrase's feature
joined to the ViT's output map (late fusion); the phrase as one more prompt (sequential); and routed prompts (MoPE). The output
folder gets results.json and predictions.png.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from files import write_atomically
from mask_pictures import Masked, draw
from pretrained import dinov2_small, minilm
from progress import Steps
from refer_data import Mosaics, mosaics
from torch import Tensor, nn

from mope_fast import MoPEConfig, MoPEFusion, PromptedEncoder, start_prompts
from mope_fast.data import segmentation_metrics, summarize
from mope_fast.encoders import encode
from mope_fast.models import SETRHead

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAINED = ("without the phrase", "late fusion", "sequential", "MoPE")
UNTRAINED = ("all shapes", "mean mask of the phrase")


class LateHead(nn.Module):
    """SETR's head on the ViT's map, with the phrase's feature concatenated at every position."""

    def __init__(self, width: int, other: int, channels: int):
        super().__init__()
        self.other = nn.Linear(other, width)
        self.head = SETRHead(2 * width, 1, channels, stages=3)

    def forward(self, maps: list[Tensor], other: Tensor) -> Tensor:
        joined = self.other(other)[:, :, None, None].expand(-1, -1, *maps[-1].shape[2:])
        return self.head([torch.cat([maps[-1], joined], dim=1)])


def make_model(method: str, main: PromptedEncoder, cross_dim: int, channels: int) -> MoPEFusion:
    settings = {"dropout": 0.0, "prompt_init": 0.06, "cross_dim": cross_dim}
    if method in ("without the phrase", "late fusion"):
        settings |= {"use_dynamic": False, "use_mapped": False}
    elif method == "sequential":
        settings |= {"use_dynamic": False}
    width = main.map_width
    head: nn.Module = SETRHead(width, 1, channels, stages=3)
    if method == "late fusion":
        settings |= {"head_inputs": "both"}
        head = LateHead(width, cross_dim, channels)
    return MoPEFusion(main, None, None, MoPEConfig(**settings), head=head, problem_type="segmentation")


def batches(data: Mosaics, features: Tensor, size: int, order: Tensor) -> Iterator[dict[str, Tensor]]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for index in order.split(size):
        images = (data.images[index] / 255 - mean) / std
        yield {"main_inputs": images, "complementary_inputs": features[data.phrase[index]], "labels": data.masks[index]}


def train(model: MoPEFusion, data: Mosaics, features: Tensor, args: argparse.Namespace, name: str) -> None:
    order = torch.randperm(len(data))
    start_prompts(model, batches(data, features, args.batch_size, order[:128]), progress=False)
    head, others = list(model.head.parameters()), [p for p in model.bank.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(head + others, lr=args.lr, weight_decay=1e-3)
    steps = args.epochs * -(-len(data) // args.batch_size)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )  # fmt: skip
    model.train()
    orders = [torch.randperm(len(data)) for _ in range(args.epochs)]
    each = (batch for order in orders for batch in batches(data, features, args.batch_size, order))
    with Steps(name, steps) as progress:
        for done, batch in enumerate(each, start=1):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head + others, 1.0)
            optimizer.step()
            schedule.step()
            progress.reach(done, f"loss {loss.item():.3f}")


@torch.no_grad()
def predict(model: MoPEFusion, data: Mosaics, features: Tensor, size: int) -> Tensor:
    """Predict masks, (N, S, S) bool."""
    model.eval()
    found = []
    for batch in batches(data, features, size, torch.arange(len(data))):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        logits = nn.functional.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        found.append(logits[:, 0] > 0)
    return torch.cat(found)


def mean_masks(train_data: Mosaics, test: Mosaics) -> Tensor:
    """Predict from the phrase alone: the mean training mask of each phrase, thresholded for the best training IoU."""
    means = torch.stack([train_data.masks[train_data.phrase == i].float().mean(0) for i in range(len(train_data.phrases))])
    means = means.nan_to_num()

    def cut(level: float, data: Mosaics) -> Tensor:
        return means[data.phrase] > level

    levels = [level / 100 for level in range(1, 30)]
    best = max(levels, key=lambda level: segmentation_metrics(cut(level, train_data), train_data.masks)["mean_iou"])
    return cut(best, test)


def picture(path: Path, data: Mosaics, predictions: dict[str, Tensor], rows: int = 6) -> None:
    """Draw the first test mosaics with the true masks and each method's predictions."""
    columns = {"named": data.masks, **predictions}
    shown = []
    for image, phrase, *masks in islice(zip(data.images, data.phrase, *columns.values(), strict=True), rows):
        named = dict(zip(columns, masks, strict=True))
        shown.append(Masked(data.phrases[phrase], image.permute(1, 2, 0).numpy(), named))
    draw(path, shown)


def run(args: argparse.Namespace) -> dict[str, dict]:
    args.output.mkdir(parents=True, exist_ok=True)
    bert, tokenizer = minilm()
    results: dict[str, list[dict[str, float]]] = {method: [] for method in (*UNTRAINED, *TRAINED)}
    began, main = time.monotonic(), PromptedEncoder(dinov2_small())
    shown: dict[str, Tensor] = {}
    for seed in range(args.seeds):
        data, test = mosaics(args.train, args.test, args.image_size, seed)
        features = encode(bert, dict(tokenizer(data.phrases, padding=True, return_tensors="pt")), pooling="mean").detach()
        features = nn.functional.normalize(features) * features.shape[1] ** 0.5
        for method in results:
            torch.manual_seed(seed)
            if method == "all shapes":
                masks = test.foreground
            elif method == "mean mask of the phrase":
                masks = mean_masks(data, test)
            else:
                model = make_model(method, main, features.shape[1], args.channels)
                train(model, data, features, args, f"{method}, seed {seed}")
                masks = predict(model, test, features, args.batch_size)
            shown.setdefault(method, masks)
            results[method].append(segmentation_metrics(masks, test.masks))
            print(f"seed {seed}, {method}: mean IoU {100 * results[method][-1]['mean_iou']:.1f} %", flush=True)
    summary = {method: summarize(runs) for method, runs in results.items()}
    for method, each in summary.items():
        spread = f" ± {100 * each.std['mean_iou']:.1f}" if args.seeds > 1 else ""
        precision = 100 * each.mean["precision@0.5"]
        print(f"{method:24} mean IoU {100 * each.mean['mean_iou']:.1f}{spread} %, at least 0.5 in {precision:.1f} %")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    minutes = (time.monotonic() - began) / 60
    report = {"settings": settings, "minutes": minutes, "results": results}
    write_atomically(args.output / "results.json", json.dumps(report, indent=2))
    picture(args.output / "predictions.png", test, shown)
    print(f"{minutes:.1f} minutes; {args.output / 'results.json'}, {args.output / 'predictions.png'}")
    return report


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--train", type=int, default=2000, help="number of training mosaics")
    add("--test", type=int, default=500, help="number of test mosaics")
    add("--epochs", type=int, default=3)
    add("--image-size", type=int, default=84, help="pixels, a multiple of 14")
    add("--batch-size", type=int, default=32)
    add("--channels", type=int, default=64, help="channels of the head")
    add("--lr", type=float, default=1e-3)
    add("--seeds", type=int, default=1, help="number of runs of every method")
    add("--smoke", action="store_true", help="quick check with a few mosaics and one epoch")
    add("--output", type=Path, default=Path("outputs/refer"))
    args = parser.parse_args(arguments)
    if args.smoke:
        args.train, args.test, args.epochs, args.channels, args.image_size = 64, 16, 1, 8, 56
    if args.image_size % 14 or min(args.train, args.test, args.epochs, args.seeds, args.channels) < 1 or args.batch_size < 2:
        parser.error("--image-size must be a multiple of 14, --batch-size at least 2, and all other numbers at least 1")
    return run(args)


if __name__ == "__main__":
    main()
