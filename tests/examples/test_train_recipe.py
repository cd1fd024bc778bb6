"""Recipes of published sets: their settings, their readers, whole runs on fixtures in the sets' own formats."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mope_fast.data import write_jsonl_folder

REASON = "needs the packages of the examples extra"
train_recipe = pytest.importorskip("train_recipe", reason=REASON)
classify_jsonl = pytest.importorskip("classify_jsonl", reason=REASON)
jsonl_task = pytest.importorskip("jsonl_task", reason=REASON)
named_encoders = pytest.importorskip("named_encoders", reason=REASON)
training_run = pytest.importorskip("training_run", reason=REASON)
recipes = pytest.importorskip("recipes", reason=REASON)
pytest.importorskip("soundfile", reason=REASON)
formats = pytest.importorskip("published_formats")
tiny_folders = pytest.importorskip("tiny_folders")

MAKE = {
    "food101": lambda folder: formats.make_food101(folder, train=4, test=2),
    "mm-imdb": lambda folder: formats.make_mm_imdb(folder, times=3),
    "snli-ve": formats.make_snli_ve,
    "hateful-memes": formats.make_hateful_memes,
    "mustard": lambda folder: formats.make_mustard(folder, 16, frames=3, media=range(1, 16)),
}
READING = {
    "food101": ["--val", "3"],
    "mustard": ["--val", "2", "--split", "speaker-independent", "--missing-media", "none"],
}
SMALL = ["--experts=2", "--prompt-length=2", "--batch-size=4", "--epochs=2", "--checkpoint-every=2"]
SMALL += ["--max-seconds=0.2", "--frames=2"]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    made = tiny_folders.write_encoders(tmp_path_factory.mktemp("tiny") / "encoders")
    return [word for pair in made.items() for word in pair]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr(jsonl_task, "CACHE", tmp_path / "cache")


def run(name, folder, output, encoders, *more):
    arguments = [name, str(folder), "--output", str(output), *encoders, *SMALL, *READING.get(name, []), *map(str, more)]
    return train_recipe.main(arguments)


RUNS = [
    (name, preset)
    for name in MAKE
    for preset in (None, "paper", "released")
    if not (preset and isinstance(getattr(recipes.RECIPES[name], preset), str))
]


@pytest.mark.parametrize(("name", "preset"), RUNS)
def test_a_recipe_runs_from_a_published_folder_to_its_report(tmp_path, encoders, name, preset, capsys):
    folder = MAKE[name](tmp_path / "set")
    results = run(name, folder, tmp_path / "out", encoders, *([f"--{preset}"] if preset else []))
    out = capsys.readouterr().out
    assert f"{preset or 'ours'}: " in out
    assert "not as published: " in out
    assert "test, as in published tables: " in out
    assert set(recipes.RECIPES[name].table) <= set(results["test"])
    assert len(results["history"]) == 2
    if preset == "released":
        assert results["best_epoch"] == 2  # the last one
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions-test.jsonl").read_text().splitlines()]
    assert len(rows) == results["samples"]["test"]["samples"]
    assert (tmp_path / "out" / "report.html").exists()


def test_samples_without_a_side_and_those_left_out_are_told(tmp_path, encoders):
    arguments = ["mustard", str(MAKE["mustard"](tmp_path / "set")), *encoders, *SMALL, *READING["mustard"]]
    args = train_recipe.parse_arguments([*arguments, "--output", str(tmp_path / "out")])
    task = train_recipe.load(args)
    accelerator = training_run.Accelerator(cpu=True)
    counts = training_run.Run(task, accelerator).task.counts()
    assert sum(split["without sound"] for split in counts.values()) == 1
    assert sum(split["without frames"] for split in counts.values()) == 1
    assert "with a grey picture" not in counts["train"]
    batch = task.collate([*task.splits["train"], *task.splits["val"]])
    assert set(batch["complementary_inputs"]) == {"audio", "video", "present"}
    assert batch["complementary_inputs"]["video"]["pixel_values"].shape[1:] == (2, 3, 16, 16)
    assert batch["complementary_inputs"]["audio"]["input_values"].shape[1] == 3200
    task.model(**batch).loss.backward()
    assert task.model.complementary.stand_ins["audio"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["snli-ve", "mustard"])
def test_a_recipe_stopped_within_an_epoch_ends_as_if_undisturbed(tmp_path, encoders, name, monkeypatch):
    folder, step = MAKE[name](tmp_path / "set"), training_run.Run._step
    if name == "snli-ve":
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            Image.effect_mandelbrot((40, 30), (-3 + number, -2.5, 2, 2.5), 99).save(path)

    def stopped(self, batch):
        if self.done == 7:
            raise KeyboardInterrupt
        return step(self, batch)

    # what a worker draws would depend on how many epochs there were since the start
    more = ["--batch-size=2", "--checkpoint-every=3", "--epochs=3", f"--workers={int(name == 'snli-ve')}"]
    expected = run(name, folder, tmp_path / "undisturbed", encoders, *more)
    with monkeypatch.context() as patch:
        patch.setattr(training_run.Run, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(name, folder, tmp_path / "stopped", encoders, *more)
    assert run(name, folder, tmp_path / "stopped", encoders, *more, "--resume") == expected
    weights = [load_file(next((tmp_path / each).glob("step-*/model.safetensors"))) for each in ("undisturbed", "stopped")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_converted_set_trains_by_classify_jsonl_as_by_the_recipe(tmp_path, encoders):
    folder = MAKE["hateful-memes"](tmp_path / "set")
    more = ["--epochs=1", "--precision=no"]
    expected = run("hateful-memes", folder, tmp_path / "recipe", encoders, *more)
    write_jsonl_folder(train_recipe.PUBLISHED_SETS["hateful-memes"].read(folder), tmp_path / "lines", progress=False)
    recipe = ["--main=image", "--max-length=512", "--schedule=steps", "--image-transform=squash"]
    arguments = [str(tmp_path / "lines"), "--output", str(tmp_path / "plain"), *encoders, *SMALL, *recipe, *more]
    got = classify_jsonl.main(arguments)
    assert (got["history"], got["test"]) == (expected["history"], expected["test"])


def test_what_mustards_recipe_leaves_predicts_the_converted_set(tmp_path, encoders):
    from mope_fast import predict

    folder = MAKE["mustard"](tmp_path / "set")
    run("mustard", folder, tmp_path / "out", encoders, "--complementary", "prompted", "--epochs", 1)
    settings = {"split": "speaker-independent", "val": 2, "missing_media": "none"}
    write_jsonl_folder(train_recipe.PUBLISHED_SETS["mustard"].read(folder, **settings), tmp_path / "lines", progress=False)
    (adapter,) = (tmp_path / "out").glob("adapter-epoch-1")
    predict.main([str(adapter), str(tmp_path / "lines" / "test.jsonl"), "-o", str(tmp_path / "predicted.jsonl")])
    expected = [json.loads(line) for line in (tmp_path / "out" / "predictions-test.jsonl").read_text().splitlines()]
    got = [json.loads(line) for line in (tmp_path / "predicted.jsonl").read_text().splitlines()]
    assert [(row["id"], row["label"]) for row in got] == [(row["id"], row["predicted"]) for row in expected]
    for row, other in zip(got, expected, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(other["scores"], abs=2e-4)


# settings


def arguments_of(tmp_path, *words):
    return train_recipe.parse_arguments([*words[:1], str(tmp_path), *words[1:]])


def test_settings_of_the_paper_of_the_release_and_what_is_given(tmp_path):
    ours, paper, released = (arguments_of(tmp_path, "mm-imdb", *preset) for preset in ([], ["--paper"], ["--released"]))
    for args in (ours, paper, released):
        assert (args.main, args.other, args.lr, args.complementary_lr) == ("image", ["text"], 4e-4, 5e-4)
        assert (args.image_model, args.text_model) == ("timm/swin_base_patch4_window7_224.ms_in22k", "bert-base-uncased")
        assert (args.schedule, args.batch_size, args.prompt_length, args.complementary_prompt_length) == ("steps", 16, 6, 4)
        assert (args.importance_weight, args.temperature, args.weight_decay, args.clip) == (0.01, 0.1, 1e-3, 1.0)
    assert (paper.experts, paper.epochs, paper.dynamic_dropout, paper.rand_augment) == (16, 15, 0.1, None)
    assert (released.experts, released.epochs, released.rand_augment, released.choose) == (4, 10, [2, 7], "last")
    assert (released.image_transform, released.image_statistics, released.head_inputs) == ("squash", "mmbt", "main")
    assert released.precision == ("fp16" if torch.cuda.is_available() else "no")
    assert (ours.experts, ours.head_inputs, ours.choose) == (16, "both", "best")
    given = arguments_of(tmp_path, "mm-imdb", "--paper", "--experts", "3", "--lr", "1e-2", "--output", "elsewhere")
    assert (given.experts, given.lr, given.epochs, str(given.output)) == (3, 1e-2, 15, "elsewhere")
    assert str(ours.output) == str(Path("outputs") / "train_recipe-mm-imdb")
    assert [arguments_of(tmp_path, name, "--released").batch_size for name in ("food101", "snli-ve")] == [38, 64]
    assert arguments_of(tmp_path, "food101").image_transform == "crop"
    assert arguments_of(tmp_path, "snli-ve").rand_augment == [2, 5]
    mustard = arguments_of(tmp_path, "mustard", "--released")
    assert (mustard.main, mustard.other, mustard.combine, mustard.val) == ("text", ["audio", "video"], "sum", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["mustard", "--paper"],
            "--paper is not for mustard: the paper's first version, the one whose text is known, doesn't have",
        ),
        (["hateful-memes", "--paper"], "--paper is not for hateful-memes: the paper's first version"),
        (["hateful-memes", "--released"], "--released is not for hateful-memes: the released code doesn't read"),
        (["snli-ve", "--val", "3"], "--val is not for snli-ve"),
        (["mm-imdb", "--missing-media", "none"], "--missing-media is not for mm-imdb"),
        (["food101", "--paper", "--released"], "not allowed with argument"),
        (["imagenet"], "invalid choice: 'imagenet'"),
        (["food101", "--other", "image"], "--other must be sides that differ from each other and from --main image"),
        (["mustard", "--rand-augment", "2", "7"], "--rand-augment needs an image side"),
        (["food101", "--rand-augment", "2", "31"], "--rand-augment needs an image side, N >= 0 operations"),
        (["food101", "--image-transform", "own", "--image-statistics", "mmbt"], "needs --image-transform crop or squash"),
        (["mustard", "--max-seconds", "0"], "--max-seconds must be a finite number > 0"),
    ],
)
def test_what_a_recipe_can_not_be_asked_for(tmp_path, words, message, capsys):
    with pytest.raises(SystemExit):
        arguments_of(tmp_path, *words)
    assert message in capsys.readouterr().err


def test_no_folder_and_a_folder_of_another_set(tmp_path, encoders, capsys):
    with pytest.raises(SystemExit):
        train_recipe.parse_arguments(["mustard", str(tmp_path / "none")])
    assert "is not a folder: expected that of MUStARD, as published" in capsys.readouterr().err
    folder = MAKE["snli-ve"](tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"is not MM-IMDB, .* it looks like SNLI-VE"):
        run("mm-imdb", folder, tmp_path / "out", encoders)


# images


def test_crop_and_squash_are_torchvisions(tmp_path):
    from torchvision import transforms
    from transformers import ViTImageProcessor

    image = Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 99).convert("RGB")
    own = ViTImageProcessor(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    mean, std = named_encoders.STATISTICS["mmbt"]
    for name, size in {"crop": 256, "squash": (256, 256)}.items():
        steps = [transforms.Resize(size), transforms.CenterCrop(224), transforms.ToTensor()]
        for statistics, norm in {"own": ([0.5] * 3, [0.25] * 3), "mmbt": (mean, std)}.items():
            expected = transforms.Compose([*steps, transforms.Normalize(*norm)])(image)
            (got,) = named_encoders.image_transform(own, name, statistics)([image])
            torch.testing.assert_close(got, expected)
    assert named_encoders.image_transform(own, "own", "own") is own
    with pytest.raises(ValueError, match="--image-transform crop needs an image size, which function"):
        named_encoders.image_transform(lambda images: images, "crop", "own")


def test_augmentation_depends_on_seed_epoch_and_sample_only(tmp_path):
    posts = train_recipe.PUBLISHED_SETS["snli-ve"].read(MAKE["snli-ve"](tmp_path))["train"]
    for path in {post.image for post in posts}:
        Image.effect_mandelbrot((40, 30), (-3, -2.5, 2, 2.5), 99).save(path)

    def drawn(seed, epoch, index):
        augmented = jsonl_task.Augmented(posts, 2, 7, seed)
        augmented.epoch = epoch
        torch.rand(3)
        return augmented[index]["image"].tobytes()

    assert drawn(0, 0, 1) == drawn(0, 0, 1)
    assert len({drawn(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1, 2)}) > 8
    state = torch.random.get_rng_state()
    augmented = jsonl_task.Augmented(posts, 2, 7, 0)
    augmented.epoch = 0
    augmented[1]
    assert torch.equal(state, torch.random.get_rng_state())
    augmented.epoch = None  # a loop that says no epoch gets others in each
    assert len({augmented[1]["image"].tobytes() for _ in range(8)}) > 1
