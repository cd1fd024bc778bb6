"""Fuse frozen encoders of text and images on Easy-VQA, a published set of questions about images.

Either side can be the main one, which takes prompts in every layer. Neither side is enough alone: the best constant answer to each
question is right in two of three cases.

With text as main, a frozen MiniLM takes prompts routed and mapped from features of a frozen ViT, computed once and kept on disk.
With the image as main, the ViT takes prompts from MiniLM, which has trained prompts of its own; on a CPU use few samples for that.

    python examples/easy_vqa.py                     # trains, saves, reloads and tests the fusion model
    python examples/easy_vqa.py --epochs 3 --balance 0  # all questions, three times
    python examples/easy_vqa.py --method sequential # static and mapped prompts, no routing
    python examples/easy_vqa.py --main image --amp  # on a GPU
    python examples/easy_vqa.py --main image --samples 640 --image-size 56 --epochs 1
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from easy_vqa_data import Questions, easy_vqa, load_pictures, normalised, tokenised
from files import write_atomically
from packages import CACHE
from pretrained import dinov2_small, minilm
from progress import Steps, tracked
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mope_fast import FeatureCache, FusionOutput, MoPEConfig, MoPEFusion, PromptTuned, analysis

METHODS = {
    "mope": "static, routed and mapped prompts",
    "sequential": "static and mapped prompts",
    "static": "static prompts: the main side alone, prompted",
    "late-concat": "prompted feature of the main side beside the other side's feature, linear head",
    "late-concat-mlp": "frozen features of both sides, one hidden layer",
    "text": "frozen text feature, one hidden layer",
    "image": "frozen image feature, one hidden layer",
}
FROZEN = ("late-concat-mlp", "text", "image")
PROMPT_INIT = 0.06


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--main", choices=("text", "image"), default="text", help="the side whose layers take prompts")
    parser.add_argument("--method", choices=METHODS, default="mope", help="; ".join(f"{k}: {v}" for k, v in METHODS.items()))
    parser.add_argument("--experts", type=int, default=16, help="K, experts per layer")
    parser.add_argument("--prompt-length", type=int, default=6, help="L, tokens of a prompt")
    parser.add_argument(
        "--epochs", type=int, default=None, help="default: 2, or 15 for methods on frozen features; 3 for the image as main"
    )
    parser.add_argument(
        "--balance", type=float, default=None,
        help="subsample so that an answer to a question occurs on average at most this many times as often as the question's "
        "rarest answer, 0: no subsampling; default: 3 for mope and sequential with text as main, else 0",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of prompts, router and mapper")
    parser.add_argument("--head-lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-3)
    parser.add_argument("--image-size", type=int, default=70, help="pixels, a multiple of 14; the images are 64 wide")
    parser.add_argument("--samples", type=int, default=None, help="number of questions of each split to use, for a quick try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast, in training and testing")
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--output", type=Path, default=Path("outputs/easy_vqa"), help="folder for all output files")
    args = parser.parse_args(words)
    if args.main == "image" and args.method in FROZEN:
        parser.error(f"--method {args.method} prompts neither side: leave out --main image")
    if args.epochs is None:
        args.epochs = 15 if args.method in FROZEN else 3 if args.main == "image" else 2
    if args.balance is None:
        args.balance = 3.0 if args.main == "text" and args.method in ("mope", "sequential") else 0.0
    least = {"experts": 1, "prompt_length": 1, "epochs": 1, "batch_size": 2, "image_size": 14}
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(args, name)}")
    for name in ("balance", "lr", "head_lr", "weight_decay"):
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) >= 0):
            parser.error(f"--{name.replace('_', '-')} must be a finite number >= 0, got {getattr(args, name)}")
    if args.image_size % 14:
        parser.error(f"--image-size must be a multiple of 14, got {args.image_size}")
    if args.samples is not None and args.samples < 2:
        parser.error(f"--samples must be at least 2, got {args.samples}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must be a folder, {args.output} is a file")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} can't be used here: {error}")
    return args


class PictureEncoder(nn.Module):
    """Encodes uint8 pictures as the ViT's class token concatenated with its mean patch token, (B, 768)."""

    def __init__(self):
        super().__init__()
        self.vit = dinov2_small()

    def forward(self, pictures: Tensor) -> Tensor:
        tokens = self.vit(normalised(pictures)).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)


def image_features(pictures: list[Tensor], device: str) -> list[Tensor]:
    """Return standardized frozen features of the training and test pictures, each computed once and kept on disk."""
    encode = FeatureCache(CACHE / "easy-vqa-images", PictureEncoder().to(device))
    names = ("training", "test")
    train, test = (
        encode.precompute(tracked(split.split(50), f"features of {name} images"), progress=False)
        for name, split in zip(names, pictures, strict=True)
    )
    mean, std = train.mean(0), train.std(0)
    return [(train - mean) / std, (test - mean) / std]


def load_data(args: argparse.Namespace) -> tuple[Questions, Questions, list[str]]:
    """Load training and test questions, and the answers' names."""
    *splits, names = easy_vqa()
    image_first, tokenizer = args.main == "image", minilm()[1]
    image_inputs = [load_pictures(split.paths, args.image_size) for split in splits]
    if not image_first:
        image_inputs = image_features(image_inputs, args.device)
    train, test = (
        tokenised(split, images, tokenizer, args.device, args.samples, image_first)
        for split, images in zip(splits, image_inputs, strict=True)
    )
    return train, test, names


@cache
def frozen_text(device: str) -> FeatureCache:
    """Return a cache of the frozen MiniLM's features; each distinct question's is computed once and kept on disk."""
    return FeatureCache(CACHE / "easy-vqa-questions", minilm()[0].to(device))


class FeatureClassifier(nn.Module):
    """A head on features of the main side, the complementary side, or both.

    Args:
        sides: for each side a function from inputs to features; None leaves a side out.
        width: total width of the features.
        hidden: width of the hidden layer; None for a linear head.
        classes: number of outputs.
    """

    def __init__(self, sides: tuple[Callable[..., Tensor] | None, ...], width: int, hidden: int | None, classes: int):
        super().__init__()
        self.main, self.complementary = sides
        linear = nn.Linear(width if hidden is None else hidden, classes)
        self.head = linear if hidden is None else nn.Sequential(nn.Linear(width, hidden), nn.GELU(), linear)

    def forward(self, main: Any, complementary: Any, labels: Tensor | None = None) -> FusionOutput:
        sides = ((self.main, main), (self.complementary, complementary))
        features = torch.cat([encode(inputs) for encode, inputs in sides if encode is not None], dim=-1)
        logits = self.head(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return FusionOutput(loss=loss, logits=logits, features=features)


class PromptedFeature(nn.Module):
    """The pooled feature of a frozen encoder with static prompts."""

    def __init__(self, encoder: nn.Module, length: int):
        super().__init__()
        self.model = PromptTuned(encoder, length, dropout=0.0, prompt_init=PROMPT_INIT)
        self.width = self.model.feature_width

    def forward(self, inputs: Any) -> Tensor:
        return self.model(inputs).features


def encoders(args: argparse.Namespace) -> tuple[nn.Module, nn.Module | None]:
    """Return the encoders (main, complementary).

    The complementary one is None with text as main, because images are then given as features, and for static prompts, which use
    one side only.
    """
    if args.main == "text":
        return minilm()[0], None
    return dinov2_small(), None if args.method == "static" else minilm()[0]


def fused_head(main: nn.Module, classes: int) -> nn.Module:
    """Build a head with one hidden layer; batch norm before it amplifies small differences, such as "not" in MiniLM's feature."""
    width = main.config.hidden_size
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, classes))


def build(args: argparse.Namespace, image_width: int | None, classes: int) -> nn.Module:
    """Build a method's model, called as model(main inputs, complementary inputs, labels); ``image_width`` is that of features."""
    if args.method in FROZEN:
        text = frozen_text(args.device)
        uses_text, uses_image = args.method != "image", args.method != "text"
        sides = (text if uses_text else None, nn.Identity() if uses_image else None)
        return FeatureClassifier(sides, uses_text * text.width + uses_image * image_width, 256, classes)
    main, complementary = encoders(args)
    if args.method == "late-concat":
        main = PromptedFeature(main, args.prompt_length)
        if complementary is None:
            return FeatureClassifier((main, nn.Identity()), main.width + image_width, None, classes)
        complementary = PromptedFeature(complementary, MoPEConfig().complementary_prompt_length)
        return FeatureClassifier((main, complementary), main.width + complementary.width, None, classes)
    routed, mapped = args.method == "mope", args.method in ("mope", "sequential")
    config = MoPEConfig(
        num_experts=args.experts, prompt_length=args.prompt_length, use_dynamic=routed, use_mapped=mapped,
        cross_dim=image_width, dropout=0.0, prompt_init=PROMPT_INIT, pooling="mean" if args.main == "text" else None,
    )  # fmt: skip
    return MoPEFusion(main, complementary, None, config, head=fused_head(main, classes))


def parameter_groups(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """Give the head a higher learning rate than the prompts, which affect a whole frozen encoder."""
    head = list(model.head.parameters())
    own = {id(p) for p in head}
    prompts = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [{"params": head, "lr": args.head_lr}, {"params": prompts, "lr": args.lr}]


def train(model: nn.Module, data: Questions, args: argparse.Namespace) -> float:
    """Train by AdamW with warm-up over a tenth of the steps and linear decay; return the seconds it took."""
    generator = torch.Generator().manual_seed(args.seed)
    epochs = [data.training_batches(args.batch_size, generator, args.balance) for _ in range(args.epochs)]
    steps = sum(map(len, epochs))
    if not steps:
        raise SystemExit(f"--balance {args.balance} leaves none of {len(data)} samples to train on: raise it, or --samples")
    optimizer = torch.optim.AdamW([g for g in parameter_groups(model, args) if g["params"]], weight_decay=args.weight_decay)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))
    )
    step = torch.compile(model, dynamic=True) if args.compile else model
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    start = time.perf_counter()
    with Steps("training", steps) as progress:
        done = 0
        for number, batches in enumerate(epochs, start=1):
            total = torch.zeros((), device=args.device)
            for i, index in enumerate(batches, start=1):
                with autocast(args):
                    output = step(*data.batch(index))
                optimizer.zero_grad()
                output.loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                total += output.loss.detach()
                done += 1
                shown = i % 20 == 0 or i == len(batches)
                progress.reach(done, f"epoch {number}/{len(epochs)}, loss {total / i:.3f}" if shown else None)
    return time.perf_counter() - start


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


def recorded(model: nn.Module, names: list[str]) -> AbstractContextManager[analysis.Recorder | None]:
    """Record the routing if the model has experts."""
    routes = isinstance(model, MoPEFusion) and model.config.use_dynamic
    return analysis.record(model, class_names=names) if routes else nullcontext()


@torch.inference_mode()
def predict(
    model: nn.Module,
    data: Questions,
    batches: Sequence[Tensor],
    args: argparse.Namespace,
    recorder: analysis.Recorder | None = None,
) -> list[Tensor]:
    """Return the logits of each batch."""
    model.eval()
    logits = []
    for index in tracked(batches, "testing"):
        *inputs, answers = data.batch(index)
        if recorder is not None:
            recorder.note(ids=index, labels=answers)
        with autocast(args):
            logits.append(model(*inputs).logits.cpu())
    return logits


def save_and_reload(model: nn.Module, args: argparse.Namespace, image_width: int | None, classes: int) -> nn.Module:
    """Save the trained parts, then load them onto newly created encoders."""
    if isinstance(model, MoPEFusion):
        model.save_pretrained(args.output / "adapter")
        main, complementary = encoders(args)
        head = fused_head(main, classes)
        return MoPEFusion.from_pretrained(args.output / "adapter", main, complementary, head=head).to(args.device)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    args.output.mkdir(parents=True, exist_ok=True)
    save_file({name: value for name, value in model.state_dict().items() if name in trained}, args.output / "trained.safetensors")
    fresh = build(args, image_width, classes).to(args.device)
    fresh.load_state_dict(load_file(args.output / "trained.safetensors"), strict=False)
    return fresh.eval()


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "report.html"):  # of an earlier run
        (args.output / name).unlink(missing_ok=True)
    train_data, test_data, names = load_data(args)
    image_width = None if args.main == "image" else train_data.image_inputs.shape[1]

    # seeded after the data is loaded: creating an encoder draws random numbers, which is skipped if features are on disk already
    torch.manual_seed(args.seed)
    model = build(args, image_width, len(names)).to(args.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.method}, {args.main} as main: {METHODS[args.method]}")
    print(f"{trained:,} trained parameters, {len(train_data):,} training questions")
    with recorded(model, names) as training:
        seconds = train(model, train_data, args)
    batches = test_data.batches(256)
    with recorded(model, names) as testing:
        logits = predict(model, test_data, batches, args, testing)
    accuracy = (torch.cat(logits).argmax(-1) == test_data.answers.cpu()[torch.cat(batches)]).float().mean().item()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {
        "test_accuracy": accuracy, "test_questions": len(test_data), "trained_parameters": trained, "training_seconds": seconds,
        "total_seconds": time.perf_counter() - start, "torch": torch.__version__, "settings": settings,
    }  # fmt: skip
    write_atomically(args.output / "result.json", json.dumps(result, indent=2))
    reloaded = save_and_reload(model, args, image_width, len(names))
    # every tenth batch covers questions of all lengths and is enough to detect a lost tensor
    some = slice(None, None, 10)
    if not all(map(torch.equal, logits[some], predict(reloaded, test_data, batches[some], args))):
        raise SystemExit("the reloaded model gives different logits")
    print(f"saved and reloaded from {args.output}, as save_and_reload() in this script does: the same logits, bit for bit")
    if testing is not None:
        test = easy_vqa()[1]
        page = testing.report(
            args.output / "report.html",
            samples=lambda i: (test.questions[i], test.paths[test.images[i]]), training=training, title="Experts on Easy-VQA",
        )  # fmt: skip
        print(f"what the experts learned: {page}")
    print(f"trained in {seconds:.0f} s, {time.perf_counter() - start:.0f} s in total")
    print(f"test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()
