"""Fuse a frozen text encoder with image features on Easy-VQA, a published set of questions about images.

Text is the main modality: routed prompts enter every layer of a frozen MiniLM, routed and mapped from features of a frozen
ViT that are computed once and kept on disk. Neither modality can answer alone: a question's best constant answer is right in
two of three cases.

    python examples/easy_vqa.py                     # trains, saves, reloads and tests the fused model
    python examples/easy_vqa.py --method sequential # static and mapped prompts, no routing
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from pretrained import CACHE, Split, dinov2_small, easy_vqa, load_image, minilm
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mope_fast import FusionOutput, MoPEConfig, MoPEFusion

matplotlib.use("Agg")

METHODS = {
    "mope": "static, routed and mapped prompts",
    "sequential": "static and mapped prompts",
    "static": "static prompts: the text alone, prompted",
    "late-concat": "prompted text feature beside the image feature, linear head",
    "late-concat-mlp": "frozen text feature beside the image feature, one hidden layer",
    "text": "frozen text feature, one hidden layer",
    "image": "image feature, one hidden layer",
}
FROZEN = ("late-concat-mlp", "text", "image")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="mope", help="; ".join(f"{k}: {v}" for k, v in METHODS.items()))
    parser.add_argument("--experts", type=int, default=16, help="K, experts a layer")
    parser.add_argument("--prompt-length", type=int, default=6, help="L, rows of a prompt")
    parser.add_argument("--epochs", type=int, default=None, help="default: 3, or 15 for methods on frozen features")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of prompts, router and mapper")
    parser.add_argument("--head-lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-3)
    parser.add_argument("--image-size", type=int, default=70, help="pixels, a multiple of 14; the images are 64 wide")
    parser.add_argument("--samples", type=int, default=None, help="use so many questions of each split, for a quick try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--output", type=Path, default=Path("outputs/easy_vqa"), help="folder for everything this writes")
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 15 if args.method in FROZEN else 3
    least = {"experts": 1, "prompt_length": 1, "epochs": 1, "batch_size": 2, "image_size": 14}
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {getattr(args, name)}")
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


def progress() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip


def image_features(splits: tuple[Split, Split], size: int, device: str) -> list[Tensor]:
    """For each split the frozen ViT's class token and mean patch token, (images, 768); computed once, kept on disk."""
    file = CACHE / f"easy-vqa-features-{size}px.safetensors"
    if not file.is_file():
        model = dinov2_small().to(device)
        features = {}
        with torch.inference_mode(), progress() as bar:
            for name, split in zip(("train", "test"), splits, strict=True):
                rows = []
                task = bar.add_task(f"image features, {name}", total=len(split.paths), note=f"{size} px")
                for i in range(0, len(split.paths), 50):
                    pixels = torch.stack([load_image(path, size) for path in split.paths[i : i + 50]])
                    tokens = model(pixels.to(device)).last_hidden_state
                    rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1).cpu())
                    bar.advance(task, len(pixels))
                features[name] = torch.cat(rows)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(features, partial)
        os.replace(partial, file)
    features = load_file(file)
    mean, std = features["train"].mean(0), features["train"].std(0)
    return [(features[name] - mean) / std for name in ("train", "test")]


@dataclass
class Questions:
    """One split, tokenised, on the device; batches hold questions of similar length."""

    input_ids: Tensor  # (n, S), padded
    lengths: Tensor  # (n,), on the CPU
    features: Tensor  # (images, 768)
    images: Tensor  # (n,)
    answers: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.answers)

    def batch(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(text inputs, image features, answers); the text is cut to the longest question."""
        longest = int(self.lengths[index].max())
        lengths = self.lengths[index].to(self.input_ids.device)
        index = index.to(self.input_ids.device)
        mask = torch.arange(longest, device=index.device) < lengths[:, None]
        text = {"input_ids": self.input_ids[index, :longest], "attention_mask": mask}
        return text, self.features[self.images[index]], self.answers[index]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Index batches: in order of length, or shuffled and in order of length within eight batches."""
        if generator is None:
            yield from self.lengths.argsort(stable=True).split(size)
            return
        groups = torch.randperm(len(self), generator=generator).split(8 * size)
        batches = [batch for group in groups for batch in group[self.lengths[group].argsort(stable=True)].split(size)]
        for i in torch.randperm(len(batches), generator=generator):
            if len(batches[i]) > 1:  # batch norm needs two
                yield batches[i]


def tokenised(split: Split, features: Tensor, tokenizer, device: str, samples: int | None) -> Questions:
    encoded = tokenizer(split.questions[:samples], padding=True, return_tensors="pt")
    lengths = encoded["attention_mask"].sum(1)
    images, answers = split.images[:samples].to(device), split.answers[:samples].to(device)
    return Questions(encoded["input_ids"].to(device), lengths, features.to(device), images, answers)


class FeatureClassifier(nn.Module):
    """A head on text and image features side by side; either may be left out, the text may be prompted or frozen."""

    def __init__(
        self, text: Callable[[dict[str, Tensor]], Tensor] | None, width: int, use_image: bool, hidden: int | None, classes: int
    ):
        super().__init__()
        self.text, self.use_image = text, use_image
        linear = nn.Linear(width if hidden is None else hidden, classes)
        self.head = linear if hidden is None else nn.Sequential(nn.Linear(width, hidden), nn.GELU(), linear)

    def forward(self, text: dict[str, Tensor], image: Tensor, labels: Tensor | None = None) -> FusionOutput:
        parts = [] if self.text is None else [self.text(text)]
        features = torch.cat([*parts, image] if self.use_image else parts, dim=-1)
        logits = self.head(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return FusionOutput(loss=loss, logits=logits, features=features)


class PromptedText(nn.Module):
    """Text feature of the frozen encoder with static prompts."""

    def __init__(self, encoder: nn.Module, config: MoPEConfig):
        super().__init__()
        self.fusion = MoPEFusion(encoder, config=config)

    def forward(self, text: dict[str, Tensor]) -> Tensor:
        return self.fusion(text).features


class FrozenText(nn.Module):
    """Text feature of the plain frozen encoder; each question is encoded once."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.known: dict[tuple[int, ...], Tensor] = {}

    def train(self, mode: bool = True) -> "FrozenText":
        # a feature's rounding depends on the batch it was computed in: forget them, so that two evaluations agree to the bit
        self.known.clear()
        return super().train(False)

    @torch.no_grad()
    def forward(self, text: dict[str, Tensor]) -> Tensor:
        keys = [tuple(row) for row in (text["input_ids"] * text["attention_mask"]).tolist()]
        keys = [key[: len(key) - next((i for i, token in enumerate(reversed(key)) if token), 0)] for key in keys]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        if new:
            index = torch.tensor(list(new.values()), device=text["input_ids"].device)
            rows = self.encoder(**{name: value[index] for name, value in text.items()}).last_hidden_state[:, 0]
            self.known.update(zip(new, rows, strict=True))
        return torch.stack([self.known[key] for key in keys])


def build(args: argparse.Namespace, cross_dim: int, classes: int) -> nn.Module:
    """The model of a method; called as model(text, image, labels)."""
    text, _ = minilm()
    width = text.config.hidden_size
    routed, mapped = args.method == "mope", args.method in ("mope", "sequential")
    config = MoPEConfig(
        num_experts=args.experts, prompt_length=args.prompt_length, use_dynamic=routed, use_mapped=mapped, cross_dim=cross_dim,
        dropout=0.0, prompt_init=0.06,
    )  # fmt: skip
    if args.method in ("mope", "sequential", "static"):
        return MoPEFusion(text, None, classes, config)
    if args.method == "late-concat":
        return FeatureClassifier(PromptedText(text, config), width + cross_dim, True, None, classes)
    uses_text, uses_image = args.method != "image", args.method != "text"
    inputs = uses_text * width + uses_image * cross_dim
    return FeatureClassifier(FrozenText(text) if uses_text else None, inputs, uses_image, 256, classes)


def parameter_groups(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """The head learns faster than the prompts, which move a whole frozen encoder."""
    head = list(model.head.parameters())
    own = {id(p) for p in head}
    prompts = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [{"params": head, "lr": args.head_lr}, {"params": prompts, "lr": args.lr}]


def train(model: nn.Module, data: Questions, args: argparse.Namespace) -> float:
    """AdamW with warm-up over a tenth of the steps and linear decay; returns the seconds it took."""
    epochs = args.epochs
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW([g for g in parameter_groups(model, args) if g["params"]], weight_decay=args.weight_decay)
    steps = epochs * -(-len(data) // args.batch_size)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up)))
    )
    step = torch.compile(model, dynamic=True) if args.compile else model
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("training", total=steps, note="")
        for epoch in range(epochs):
            total = torch.zeros((), device=args.device)
            for i, index in enumerate(data.batches(args.batch_size, generator), start=1):
                output = step(*data.batch(index))
                optimizer.zero_grad()
                output.loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                total += output.loss.detach()
                if i % 50 == 0:
                    bar.update(task, advance=50, note=f"epoch {epoch + 1}/{epochs}, loss {total / i:.3f}")
            bar.update(task, completed=(epoch + 1) * steps // epochs, note=f"epoch {epoch + 1}/{epochs}, loss {total / i:.3f}")
    return time.perf_counter() - start


@torch.inference_mode()
def predict(model: nn.Module, data: Questions) -> tuple[Tensor, Tensor | None]:
    """Logits (n, classes) and, with a router, scores (n, layers, experts), in the split's order."""
    model.eval()
    order, logits, scores = [], [], []
    with progress() as bar:
        task = bar.add_task("testing", total=len(data), note="")
        for index in data.batches(256):
            output = model(*data.batch(index)[:2])
            order.append(index)
            logits.append(output.logits.cpu())
            if output.scores is not None:
                scores.append(output.scores.transpose(0, 1).cpu())
            bar.advance(task, len(index))
    back = torch.cat(order).argsort()
    return torch.cat(logits)[back], torch.cat(scores)[back] if scores else None


def save_and_reload(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Write the trained parts, then read them onto fresh encoders."""
    if isinstance(model, MoPEFusion):
        model.save_pretrained(args.output / "adapter")
        return MoPEFusion.from_pretrained(args.output / "adapter", minilm()[0]).to(args.device)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    args.output.mkdir(parents=True, exist_ok=True)
    save_file({name: value for name, value in model.state_dict().items() if name in trained}, args.output / "trained.safetensors")
    fresh = build(args, args.cross_dim, args.classes).to(args.device)
    fresh.load_state_dict(load_file(args.output / "trained.safetensors"), strict=False)
    return fresh.eval()


def draw_experts(scores: Tensor, answers: Tensor, names: list[str], file: Path) -> None:
    """A heat map for each layer: mean routing score of each expert, for each answer."""
    import matplotlib.pyplot as plt

    layers = scores.shape[1]
    columns = min(3, layers)
    figure, axes = plt.subplots(
        -(-layers // columns), columns, figsize=(15, 4.2 * -(-layers // columns)), squeeze=False, layout="constrained"
    )
    means = torch.stack(
        [scores[answers == i].mean(0) if (answers == i).any() else scores.new_zeros(scores.shape[1:]) for i in range(len(names))]
    )
    for axis in axes.flat[layers:]:
        axis.set_visible(False)
    for layer, axis in enumerate(axes.flat[:layers]):
        image = axis.imshow(means[:, layer], aspect="auto", cmap="viridis", vmin=0, vmax=float(means.max()))
        axis.set_title(f"layer {layer + 1}")
        axis.set_xlabel("expert")
        axis.set_yticks(range(len(names)), names if layer % columns == 0 else [])
        axis.set_xticks(range(0, scores.shape[2], max(1, scores.shape[2] // 8)))
    figure.colorbar(image, ax=axes, label="mean routing score")
    figure.suptitle("Which experts answer what (Easy-VQA test questions)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    train_split, test_split, names = easy_vqa()
    train_features, test_features = image_features((train_split, test_split), args.image_size, args.device)
    _, tokenizer = minilm()
    train_data = tokenised(train_split, train_features, tokenizer, args.device, args.samples)
    test_data = tokenised(test_split, test_features, tokenizer, args.device, args.samples)
    args.cross_dim, args.classes = train_features.shape[1], len(names)

    model = build(args, args.cross_dim, args.classes).to(args.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.method}: {METHODS[args.method]}; {trained:,} trained parameters, {len(train_data):,} training questions")
    seconds = train(model, train_data, args)
    logits, _ = predict(model, test_data)
    reloaded = save_and_reload(model, args)
    reloaded_logits, scores = predict(reloaded, test_data)
    if not torch.equal(logits, reloaded_logits):
        raise SystemExit(f"the reloaded model differs by {(logits - reloaded_logits).abs().max():.1e}")
    print(f"saved and reloaded from {args.output}: the same logits, bit for bit")
    answers = test_data.answers.cpu()
    if scores is not None:
        draw_experts(scores, answers, names, args.output / "experts.png")
    accuracy = (logits.argmax(-1) == answers).float().mean().item()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {
        "test_accuracy": accuracy, "test_questions": len(test_data), "trained_parameters": trained, "training_seconds": seconds,
        "total_seconds": time.perf_counter() - start, "torch": torch.__version__, "settings": settings,
    }  # fmt: skip
    (args.output / "result.json").write_text(json.dumps(result, indent=2))
    print(f"trained in {seconds:.0f} s, {result['total_seconds']:.0f} s in all")
    print(f"test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()
