"""What the programs on JSONL folders share: arguments, encoders by name, batches, optimiser, metrics."""

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packages import CACHE
from pretrained import dinov2_small, minilm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from mope_fast import FeatureCache, FusionCollator, MoPEConfig, MoPEFusion, Predictor, fit_head, start_prompts
from mope_fast.data import Posts, TimmTransform, classification_metrics, multi_label_metrics, read_jsonl_folder

PACKAGED_TEXT, PACKAGED_IMAGE = "minilm", "dinov2-small"
PACKAGED_RECIPE = {"lr": 1e-3, "head_lr": 5e-3, "dropout": 0.0, "prompt_init": 0.06}
"""Small encoders want this on Easy-VQA: defaults where the main side is one of the packaged ones."""
PACKAGED_PIXELS = {
    "interpolation": "bicubic", "crop_mode": "squash", "crop_pct": 1.0,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
"""How the packaged image encoder's images are made: the whole one, squeezed into a square."""
START_SAMPLES = 256
"""Of whose tokens prompts start at the mean."""
Encoder = tuple[nn.Module, Callable[..., Any]]
"""A frozen encoder, and what makes its inputs of a list of texts or images."""


def argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        help="train.jsonl, val.jsonl, labels.txt, the images; test.jsonl if there is one, with or without labels",
    )
    add("--main", choices=("text", "image"), default="text", help="the side whose layers take prompts")
    add("--text-model", default=PACKAGED_TEXT, help=f"a transformers folder or name; {PACKAGED_TEXT} comes from a package")
    add(
        "--image-model", default=PACKAGED_IMAGE,
        help=f"a transformers folder or name, or a timm model as timm/NAME; {PACKAGED_IMAGE} comes from a package",
    )  # fmt: skip
    add("--image-size", type=int, default=112, help=f"pixels, a multiple of 14; for {PACKAGED_IMAGE} only, others know theirs")
    add("--max-length", type=int, default=128, help="tokens of a text, longer ones are cut")
    add(
        "--complementary", choices=("prompted", "frozen"), default="prompted",
        help="the other side's encoder: with trained prompts of its own, or as it is, each sample computed once for all runs",
    )  # fmt: skip
    add("--experts", type=int, default=16, help="K, experts a layer")
    add("--prompt-length", type=int, default=6, help="L, rows of a prompt")
    add("--complementary-prompt-length", type=int, default=4, help="rows of the other side's prompts")
    add("--dropout", type=float, default=None, help="on prompts; default: the paper's 0.1")
    add("--noise-std", type=float, default=1 / 256, help="of the noise on routing logits, in training")
    add("--mapper-norm", choices=("batch", "layer", "none"), default="batch", help="on the way of the other feature to a prompt")
    add("--prompt-init", type=float, default=None, help="prompts start uniform in +- this; default: the release's rule")
    add("--importance-weight", type=float, default=0.01, help="of the importance loss, 0 for none")
    add("--no-static", action="store_true", help="leave out static prompts")
    add("--no-dynamic", action="store_true", help="leave out routed prompts: no experts, no router")
    add("--no-mapped", action="store_true", help="leave out the other feature as a prompt")
    add("--top-k", type=int, default=None, help="keep the k largest routing scores; default: all")
    add("--learn-keys", action="store_true", help="train the routing keys")
    add("--temperature", type=float, default=0.1, help="of the router's softmax")
    add("--head-inputs", choices=("main", "both"), default="both", help="what the head reads: the fused feature, or the other too")
    poolings, default = ("own", "cls", "mean", "last", "cls+mean"), f"default: mean for {PACKAGED_TEXT}, else its own"
    add("--pooling", choices=poolings, default=None, help=f"of the main encoder's tokens; {default}")
    add("--router-pooling", choices=poolings[:-1], default="own", help="of a layer's input, for the router")
    add("--complementary-pooling", choices=poolings, default=None, help=f"of the other encoder's tokens; {default}")
    add("--lr", type=float, default=None, help="of prompts, router and mapper; default: the paper's 5e-4 for text, 4e-4 for images")
    add("--complementary-lr", type=float, default=None, help="of the other side's prompts; default: the paper's of that side")
    add("--head-lr", type=float, default=None, help="default: as --lr")
    add(
        "--head-epochs",
        type=int,
        default=0,
        help="of the head alone, before anything else, with prompts put where an image encoder's tokens are: each sample runs "
        "through the encoders once",
    )
    add("--check-images", action="store_true", help="read every image before anything else")
    add("--debug", action="store_true", help="show where an error comes from")
    add("--weight-decay", type=float, default=1e-3)
    add("--schedule", choices=("linear", "steps"), default="linear", help="warm-up and decay; or the paper's x 0.4 at epochs 3, 6")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=32, help="of each process")
    add("--samples", type=int, default=None, help="use the first so many of each split, for a quick try")
    add("--missing-images", choices=("error", "skip", "grey"), default="error", help="leave out, or put a grey picture in place")
    add(
        "--outside", type=Path, nargs="+", default=[], help="folders outside of FOLDER that its images may be in, by a link or path"
    )
    add("--workers", type=int, default=0, help="processes that read and decode")
    add("--seed", type=int, default=42)
    add("--output", type=Path, default=Path("outputs") / output, help="folder for everything this writes")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Ends the program with one line for arguments that make no sense; fills in what was left to us."""
    least = {"image_size": 14, "max_length": 3, "experts": 1, "prompt_length": 1, "complementary_prompt_length": 0, "epochs": 1}
    least |= {"batch_size": 2, "samples": 2, "workers": 0, "head_epochs": 0}
    for name, value in least.items():
        got = getattr(args, name)
        if got is not None and got < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {got}")
    for name in ("lr", "complementary_lr", "head_lr", "weight_decay", "clip", "importance_weight", "noise_std"):
        got = getattr(args, name)
        if got is not None and not (math.isfinite(got) and (got > 0 if name == "clip" else got >= 0)):
            parser.error(f"--{name.replace('_', '-')} must be a finite number {'> 0' if name == 'clip' else '>= 0'}, got {got}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be 0 to 2**32 - 1, got {args.seed}")
    if args.image_model == PACKAGED_IMAGE and args.image_size % 14:
        parser.error(f"--image-size must be a multiple of 14, got {args.image_size}")
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder: expected one with train.jsonl, val.jsonl and labels.txt")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must be a folder, {args.output} is a file")
    if not getattr(args, "resume", False) and not is_unused(args.output):
        more = "go on with it by --resume, or give another --output" if hasattr(args, "resume") else "give another --output"
        parser.error(f"{args.output} has files already: {more}")
    papers = {"text": 5e-4, "image": 4e-4}
    other = "image" if args.main == "text" else "text"
    recipe = {"lr": papers[args.main], "complementary_lr": papers[other], "dropout": 0.1}
    if getattr(args, f"{args.main}_model") in (PACKAGED_TEXT, PACKAGED_IMAGE):
        recipe |= PACKAGED_RECIPE
    for name, side in (("pooling", args.main), ("complementary_pooling", other)):
        recipe[name] = "mean" if side == "text" and args.text_model == PACKAGED_TEXT else "own"
    if args.top_k is not None and not 1 <= args.top_k <= args.experts:
        parser.error(f"--top-k must be 1 to --experts ({args.experts}), got {args.top_k}")
    if args.no_static and args.no_dynamic and args.no_mapped:
        parser.error("--no-static --no-dynamic --no-mapped leaves no prompt: drop one of them")
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        parser.error(f"--temperature must be a finite number > 0, got {args.temperature}")
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


@dataclass
class Task:
    """A folder's data, and a model for it."""

    splits: dict[str, Posts]
    collate: FusionCollator
    model: MoPEFusion
    args: argparse.Namespace

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits["train"].class_names

    def loader(self, split: str, sampler: Any = None) -> DataLoader:
        """Training batches are shuffled and all of one size: batch norm can't train on one sample."""
        training, posts = split == "train", self.splits[split]
        count = len(posts if sampler is None else sampler)
        return DataLoader(
            posts, self.args.batch_size, collate_fn=self.collate, num_workers=self.args.workers, sampler=sampler,
            shuffle=training and sampler is None, drop_last=training and count > self.args.batch_size,
            generator=torch.Generator().manual_seed(self.args.seed),
        )  # fmt: skip

    def optimizer(self, steps_per_epoch: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """AdamW, and its learning rate after each step."""
        args = self.args
        groups = self.model.parameter_groups(args.lr, args.complementary_lr, args.weight_decay)
        if args.head_lr is not None:
            head = set(self.model.head.parameters())
            groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter not in head]
            groups.append({"params": list(head), "lr": args.head_lr, "weight_decay": args.weight_decay})
        optimizer = torch.optim.AdamW(groups)
        if args.schedule == "linear":
            steps = args.epochs * steps_per_epoch
            return optimizer, get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
        milestones = [3 * steps_per_epoch, 6 * steps_per_epoch]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.4)

    def fit_head(self) -> None:
        """Start prompts where tokens are and train the head alone first, if that was asked for; every process does the same."""
        if self.args.head_epochs:
            self.model.to(default_device())
            some = itertools.islice(self._batches(), -(-START_SAMPLES // self.args.batch_size))
            start_prompts(self.model, some)
            fit_head(
                self.model, self._batches(), epochs=self.args.head_epochs, batch_size=self.args.batch_size, seed=self.args.seed
            )  # fmt: skip

    def _batches(self) -> Iterator[Any]:
        """Of training samples in the seed's order, one by one: pictures of all of them may not fit into memory."""
        order = torch.randperm(len(self.splits["train"]), generator=torch.Generator().manual_seed(self.args.seed))
        for batch in self.loader("train", order.tolist()):
            yield to_device(batch, default_device())

    def save(self, folder: Path) -> None:
        """What ``python -m mope_fast.predict`` takes, and ``MoPEFusion.from_pretrained``."""
        Predictor(self.model, self.collate, self.class_names).save_pretrained(folder)

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, macro and micro F1."""
        if self.splits["train"].multi_label:
            return multi_label_metrics(logits, labels)
        metrics = classification_metrics(logits, labels, len(self.class_names))
        # of samples with one class each every mistake is one class too many and one too few
        return {"accuracy": metrics["accuracy"], "f1_macro": metrics["f1_macro"], "f1_micro": metrics["accuracy"]}

    @property
    def chosen_by(self) -> str:
        """The metric that says which epoch is the best."""
        return "f1_macro" if self.splits["train"].multi_label else "accuracy"


def load_task(args: argparse.Namespace) -> Task:
    """Read the folder, and make the model from the seed."""
    splits = read_jsonl_folder(args.folder, missing_images=args.missing_images, outside=args.outside)
    if unlabelled := [name for name in ("train", "val") if not splits[name].labelled]:
        raise ValueError(f"{args.folder}: {', '.join(unlabelled)} has no labels: train and val need a label in each line")
    if args.samples is not None:
        splits = {name: replace(posts, posts=posts.posts[: args.samples]) for name, posts in splits.items()}
    if args.check_images:
        for posts in splits.values():
            posts.check_images()
    sides = {"text": text_encoder(args.text_model, args.max_length), "image": image_encoder(args.image_model, args.image_size)}
    other = "image" if args.main == "text" else "text"
    (main, main_inputs), (complementary, complementary_inputs) = sides[args.main], sides[other]
    if args.complementary == "frozen":
        complementary.to(default_device())
        name, pooling = _file_name(getattr(args, f"{other}_model")), _pooling(args.complementary_pooling)
        folder = CACHE / "features" / (name if pooling is None else f"{name}-{pooling}")
        complementary = FeatureCache(folder, complementary, pooling=pooling)
    config = MoPEConfig(
        num_experts=args.experts, prompt_length=args.prompt_length, dropout=args.dropout, noise_std=args.noise_std,
        prompt_init=args.prompt_init, mapper_norm=args.mapper_norm, importance_weight=args.importance_weight,
        complementary_prompt_length=args.complementary_prompt_length, use_static=not args.no_static,
        use_dynamic=not args.no_dynamic, use_mapped=not args.no_mapped, top_k=args.top_k, learn_keys=args.learn_keys,
        temperature=args.temperature, head_inputs=args.head_inputs, pooling=_pooling(args.pooling),
        router_pooling=_pooling(args.router_pooling),
        complementary_pooling=None if args.complementary == "frozen" else _pooling(args.complementary_pooling),
    )  # fmt: skip
    torch.manual_seed(args.seed)
    several = splits["train"].multi_label
    model = MoPEFusion(
        main, complementary, len(splits["train"].class_names), config,
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    collate = FusionCollator(main_inputs, complementary_inputs, main_field=args.main, complementary_field=other)
    return Task(splits, collate, model, args)


def text_encoder(name: str, max_length: int) -> Encoder:
    if name == PACKAGED_TEXT:
        encoder, tokenizer = minilm()
    else:
        from transformers import AutoModel, AutoTokenizer

        encoder, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    return encoder, partial(tokenizer, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


def image_encoder(name: str, size: int) -> Encoder:
    if name == PACKAGED_IMAGE:
        return dinov2_small(), TimmTransform({"input_size": (3, size, size), **PACKAGED_PIXELS})
    if name.startswith("timm/"):
        import timm

        encoder = timm.create_model(name.removeprefix("timm/"), pretrained=True)
        return encoder, TimmTransform.of(encoder)
    from transformers import AutoImageProcessor, AutoModel

    return AutoModel.from_pretrained(name), AutoImageProcessor.from_pretrained(name)


def _pooling(name: str) -> str | None:
    return None if name == "own" else name


def _file_name(model: str) -> str:
    return model.strip("/").replace("/", "-")


def run_from_shell(main: Callable[[], Any]) -> None:
    """What is wrong with the folder's files is said in a line; with --debug with a traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        if "--debug" in sys.argv:
            raise
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(value: Any, device: str | torch.device) -> Any:
    """A batch's tensors, in dicts too."""
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    return value.to(device, non_blocking=True)


def is_unused(folder: Path) -> bool:
    """Whether it isn't there or has nothing in it, but for what a process that was killed at once leaves."""
    leftovers = r"\.lock|\.settings\.json\.\d+\.part"
    return not folder.exists() or all(re.fullmatch(leftovers, path.name) for path in folder.iterdir())
