"""MoPE-BAF from a few samples: which of its parts help, on data that needs no model or data hub.

A small VLMo is trained from scratch on two types of Easy-VQA's questions. Then it is adapted to a third type from 32 samples of
each answer, with several methods and seeds, and tested on the official test questions of that type:

    python examples/few_shot_baf.py                          # about half an hour of CPU time, on all cores
    python examples/few_shot_baf.py --held-out what-shape    # three answers in place of eleven
    python examples/few_shot_baf.py --seeds 1 --steps 20 --pretrain-steps 50 --test-samples 100

Finished runs are kept in the output folder: started again with the same settings, the program continues where it stopped.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from progress import Steps
from question_types import LONGEST, SIZE, TYPES, Questions, load
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from mope_fast import BAFConfig, MoPEBAF, VLMo, VLMoConfig
from mope_fast.data import FewShotRecipe, FewShotSplit, classification_metrics, predict, summarize

matplotlib.use("Agg")

ROWS = 4
"""Tokens of each group of prompts."""


def prompts(text: int = ROWS, image: int = ROWS, unified: int = ROWS, **settings) -> dict:
    return {"text_prompt_length": text, "image_prompt_length": image, "unified_prompt_length": unified, **settings}


METHODS = {
    "no prompts": prompts(0, 0, 0, num_blocks=1),
    "plain prompts": prompts(3 * ROWS, 0, 0, num_blocks=1, restricted=False, keep_modality_prompts=True),
    "three prompts, unrestricted": prompts(num_blocks=1, restricted=False),
    "restricted (1 block)": prompts(num_blocks=1),
    "restricted + BAF, 2 blocks": prompts(num_blocks=2),
    "restricted + BAF, 3 blocks": prompts(num_blocks=3),
    "restricted + BAF, 4 blocks": prompts(num_blocks=4),
    "2 blocks without L-Prompt": prompts(text=0),
    "2 blocks without V-Prompt": prompts(image=0),
    "2 blocks without VL-Prompt": prompts(unified=0),
}
"""Settings of BAFConfig. Without prompts the model is VLMo itself: full fine-tuning, or a head on frozen features.

Plain prompts have as many tokens as the three groups together; they precede the text and are visible to all tokens in all layers.
The head reads the mean of the VL-Prompt, or VLMo's pooler without one. Without L- or V-Prompt there is nothing to fuse between the
blocks, so compare these two with 1 block.
"""
BACKBONES = {"trained": False, "frozen": True}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--held-out", choices=TYPES, default="what-is", help="; ".join(f"{k}: {v}" for k, v in TYPES.items()))
    parser.add_argument(
        "--shots", type=int, default=32, help="training samples of each answer; as many are used to select the step"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds of samples, new parameters and order")
    parser.add_argument("--steps", type=int, default=200, help="steps of adaptation, with 8 samples each")
    # both rates are the best of three on the dev samples of one additional seed, for "no prompts" and "2 blocks"
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of adaptation if the backbone is trained")
    parser.add_argument("--frozen-lr", type=float, default=3e-2, help="learning rate of adaptation if the backbone is frozen")
    parser.add_argument("--pretrain-steps", type=int, default=2400, help="steps of pretraining, with 64 samples each")
    parser.add_argument("--pretrain-lr", type=float, default=1.5e-3)
    parser.add_argument("--test-samples", type=int, default=None, help="number of test questions to use; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes for adaptation, one thread each; default: CPU cores, or 1 on a GPU"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/few_shot_baf"), help="folder for all output files")
    args = parser.parse_args()
    for name in ("shots", "seeds", "steps", "pretrain_steps", "test_samples", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.workers is None:
        args.workers = os.cpu_count() if args.device == "cpu" else 1
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must be a folder, {args.output} is a file")
    return args


def architecture(vocabulary: int) -> VLMoConfig:
    """Configure a VLMo of 1.3 M parameters: four layers with one expert per modality, two with the joint expert."""
    return VLMoConfig(
        hidden_size=96, num_layers=6, num_heads=4, first_fusion_layer=4, image_size=SIZE, patch_size=8, vocab_size=vocabulary,
        max_text_length=LONGEST, drop_path_rate=0.0,
    )  # fmt: skip


def pretrained(data: Questions, vocabulary: int, args: argparse.Namespace) -> Path:
    """Return a checkpoint file of a VLMo trained to answer questions; train it if the file doesn't exist."""
    settings = {
        "held_out": args.held_out,
        "steps": args.pretrain_steps,
        "lr": args.pretrain_lr,
        **architecture(vocabulary).to_dict(),
    }
    file = args.output / f"vlmo-{short_hash(settings)}.safetensors"
    if file.exists():
        return file
    torch.manual_seed(0)
    model = MoPEBAF(VLMo(architecture(vocabulary)), len(data.names), BAFConfig(**METHODS["no prompts"])).to(args.device)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.pretrain_lr, args.pretrain_steps + 1, pct_start=0.1)
    model.train()
    with Steps("training a VLMo", args.pretrain_steps) as progress:
        total = torch.zeros((), device=args.device)
        for step, index in enumerate(balanced(data, args.pretrain_steps, 64, generator), start=1):
            batch = data.batch(index)
            batch["pixel_values"] = moved(batch["pixel_values"], generator)
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
            note = None
            if step % 50 == 0:
                note = f"loss {total / 50:.3f}"
                total.zero_()
            progress.reach(step, note)
    part = file.with_suffix(".part")
    save_file(model.backbone.state_dict(), part)
    os.replace(part, file)
    return file


def short_hash(settings: dict) -> str:
    """Hash settings for the name of a file that is valid for these settings only."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def balanced(data: Questions, steps: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches in which all types are equally frequent, and so are all answers within a type."""
    kinds, counts = data.kinds.unique(return_counts=True)
    types = kinds // len(data.names)
    of_type = torch.bincount(types)[types]
    weights = (1 / (counts * of_type))[torch.searchsorted(kinds, data.kinds)]
    for _ in range(steps):
        yield torch.multinomial(weights, size, replacement=True, generator=generator)


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Augment: shift all pictures by up to a tenth of their side, and mirror half of the time; no answer depends on that."""
    reach = SIZE // 10
    x, y, mirrored = (int(torch.randint(size, (), generator=generator)) for size in (2 * reach + 1, 2 * reach + 1, 2))
    pictures = F.pad(pictures, [reach] * 4, mode="replicate")[:, :, y : y + SIZE, x : x + SIZE]
    return pictures.flip(3) if mirrored else pictures


def adapt(method: str, backbone: str, file: Path, vocabulary: int, train: Questions, test: Questions, seed: int, args) -> dict:
    """Do one run: batches and steps as in the paper, a learning rate for a small VLMo, the best on dev of four evaluations."""
    split = FewShotSplit(train.labels, shots=args.shots, seed=seed)
    torch.manual_seed(seed)
    frozen = BACKBONES[backbone]
    config = BAFConfig(**METHODS[method], freeze_backbone=frozen)
    model = MoPEBAF(VLMo.from_checkpoint(file, architecture(vocabulary)), len(train.names), config).to(args.device)
    recipe = FewShotRecipe(
        lr=args.frozen_lr if frozen else args.lr, steps=args.steps, evaluate_every=max(1, args.steps // 4), max_grad_norm=1.0
    )
    run = recipe.fit(model, train.batch, split.train, dev=split.dev, seed=seed, progress=False)
    index = torch.arange(len(test))[: args.test_samples]
    logits = predict(model, test.batch, index, batch_size=256)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    metrics = classification_metrics(logits, test.labels[index.to(test.labels.device)], len(test.names))
    return {**metrics, "dev": run.best_accuracy, "parameters": trained}


def in_processes(todo: list[tuple[str, str, int]], shared: tuple, workers: int) -> Iterator[tuple[tuple[str, str, int], dict]]:
    """Yield each run with its result as it finishes; runs use one thread each, because steps are too small for a second one."""
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=shared) as pool:
        runs = {pool.submit(_adapt, *run): run for run in todo}
        try:
            for done in as_completed(runs):
                yield runs[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(*shared) -> None:
    global _shared
    _shared = shared
    torch.set_num_threads(1)


def _adapt(backbone: str, method: str, seed: int) -> dict:
    file, vocabulary, train, test, args = _shared
    return adapt(method, backbone, file, vocabulary, train, test, seed, args)


class Runs:
    """Finished runs, written to disk after each one so that a stopped program can continue. Each setting has its own file."""

    def __init__(self, args: argparse.Namespace):
        self.settings = {key: value for key, value in vars(args).items() if key not in ("output", "seeds", "device", "workers")}
        self.settings["methods"] = METHODS
        self.file = args.output / f"runs-{short_hash(self.settings)}.json"
        self.results: dict[str, dict] = json.loads(self.file.read_text())["results"] if self.file.exists() else {}

    def add(self, backbone: str, method: str, seed: int, result: dict) -> None:
        self.results[f"{backbone} | {method} | {seed}"] = result
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "results": self.results}, indent=1))
        os.replace(part, self.file)

    def of(self, backbone: str, method: str, seed: int) -> dict | None:
        return self.results.get(f"{backbone} | {method} | {seed}")

    def missing(self, seeds: int) -> list[tuple[str, str, int]]:
        """Return (backbone, method, seed) of the runs still to do, seed by seed."""
        everything = itertools.product(range(seeds), BACKBONES, METHODS)
        return [(backbone, method, seed) for seed, backbone, method in everything if self.of(backbone, method, seed) is None]


def table(runs: Runs, args: argparse.Namespace) -> Table:
    title = (
        f"{args.held_out} from {args.shots} shots per class, {args.seeds} seeds: test accuracy and macro F1 in %, mean ± deviation"
    )
    result = Table("", title=title, title_justify="left")
    for backbone in BACKBONES:
        for heading in (f"{backbone} VLMo", "F1", "trained"):
            result.add_column(heading, justify="right")
    for method in METHODS:
        cells = []
        for backbone in BACKBONES:
            results = [runs.of(backbone, method, seed) for seed in range(args.seeds)]
            summary = summarize([{name: result[name] for name in ("accuracy", "f1_macro")} for result in results])
            cells += [f"{100 * summary.mean[name]:.1f} ± {100 * summary.std[name]:.1f}" for name in summary.mean]
            cells.append(f"{results[0]['parameters']:,}")
        result.add_row(method, *cells)
    return result


def draw(runs: Runs, args: argparse.Namespace, chance: float, file: Path) -> None:
    """Plot a row for each method, with a dot for every seed and a bar for mean and deviation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(BACKBONES), figsize=(11, 4.5), sharey=True, sharex=True, layout="constrained")
    for axis, backbone in zip(axes, BACKBONES, strict=True):
        for row, method in enumerate(METHODS):
            values = torch.tensor(
                [100 * result["accuracy"] for result in [runs.of(backbone, method, seed) for seed in range(args.seeds)]]
            )
            deviation = values.std().item() if len(values) > 1 else 0.0
            axis.errorbar(values.mean().item(), row, xerr=deviation, fmt="s", color="C0", capsize=4)
            axis.plot(values, [row + 0.22] * len(values), "o", color="C1", markersize=3)
        axis.axvline(100 * chance, color="0.6", linestyle="--", linewidth=1)
        axis.set(title=f"{backbone} VLMo", xlabel="test accuracy in %, dashed: the most common answer")
        axis.grid(axis="x", color="0.92")
    axes[0].set_yticks(range(len(METHODS)), METHODS)
    axes[0].invert_yaxis()
    figure.suptitle(f"{args.held_out} from {args.shots} shots per class: {args.seeds} seeds (dots), mean and deviation")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    pretraining, train, test, vocabulary = load(args.held_out, args.device)
    counts = f"{len(pretraining):,} questions of other types, {len(train):,} to take shots from, {len(test):,} to test"
    print(f"{args.held_out}: {', '.join(train.names)}; {counts}")
    file = pretrained(pretraining, vocabulary, args)
    runs = Runs(args)
    todo = runs.missing(args.seeds)
    with Steps("adapting it", len(todo)) as progress:
        results = in_processes(todo, (file, vocabulary, train, test, args), args.workers)
        for done, ((backbone, method, seed), result) in enumerate(results, start=1):
            runs.add(backbone, method, seed, result)
            progress.reach(done, f"{backbone}: {method}, seed {seed}: {100 * result['accuracy']:.1f} %")
    answers = test.labels[: args.test_samples]
    chance = torch.bincount(answers).max().item() / len(answers)
    Console(width=130).print(table(runs, args))
    print(f"the most common answer is right in {100 * chance:.1f} %")
    draw(runs, args, chance, args.output / "few_shot.png")
    print(f"{args.output / 'few_shot.png'} and {runs.file}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
