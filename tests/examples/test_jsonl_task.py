"""What the programs on JSONL folders share: encoders by folder or name, batches, learning rates; and Easy-VQA as such a folder."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

REASON = "needs the packages of the examples extra"
jsonl_task = pytest.importorskip("jsonl_task", reason=REASON)
task_arguments = pytest.importorskip("task_arguments", reason=REASON)
easy_vqa_jsonl = pytest.importorskip("easy_vqa_jsonl", reason=REASON)
tiny_task = pytest.importorskip("tiny_task", reason=REASON)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "which", "color"]


@pytest.fixture
def task(tmp_path, monkeypatch):
    tiny_task.use_tiny_encoders(tmp_path, monkeypatch.setattr)
    folder = tiny_task.write_folder(tmp_path / "data")

    def make(*arguments):
        parser = task_arguments.argument_parser("", "")
        return jsonl_task.load_task(task_arguments.check(parser, parser.parse_args([str(folder), *arguments])))

    return make


def test_encoders_of_transformers_are_read_from_a_folder(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertModel(BertConfig(**sizes, vocab_size=len(WORDS))).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")

    bert, tokenize = jsonl_task.text_encoder(str(tmp_path / "bert"), 4)
    inputs = tokenize(["red blue red blue red", "which"])
    assert inputs["input_ids"].shape == (2, 4)
    assert bert(**inputs).last_hidden_state.shape == (2, 4, 16)
    vit, process = jsonl_task.image_encoder(str(tmp_path / "vit"), 0)
    pixels = process([Image.new("RGB", (30, 20))] * 2, return_tensors="pt")
    assert vit(**pixels).last_hidden_state.shape == (2, 5, 16)


def test_image_encoders_of_timm_come_by_name_with_their_own_transform(monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def without_weights(name, pretrained):
        asked.append((name, pretrained))
        return create(name)

    monkeypatch.setattr(timm, "create_model", without_weights)
    vit, process = jsonl_task.image_encoder("timm/vit_tiny_patch16_224", 0)
    assert asked == [("vit_tiny_patch16_224", True)]
    assert process([Image.new("RGB", (30, 40))] * 2).shape == (2, 3, 224, 224)
    assert vit.num_features == 192


def test_learning_rates(task):
    made = task("--epochs", "10", "--lr", "1e-3", "--complementary-lr", "2e-3", "--head-lr", "5e-3", "--weight-decay", "0.1")
    optimizer, schedule = made.optimizer(steps_per_epoch=4)
    groups = {group["initial_lr"]: group for group in optimizer.param_groups}
    assert {id(p) for p in groups[5e-3]["params"]} == {id(p) for p in made.model.head.parameters()}
    assert {id(p) for p in groups[2e-3]["params"]} == {id(p) for p in made.model.complementary.parameters() if p.requires_grad}
    trained = {id(p) for p in made.model.parameters() if p.requires_grad}
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(trained)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    rates = []
    for _ in range(40):
        rates.append(groups[1e-3]["lr"])
        optimizer.step()
        schedule.step()
    # warm-up over a tenth of the steps, then down to zero
    expected = [1e-3 * min(step / 4, (40 - step) / 36) for step in range(40)]
    assert rates == pytest.approx(expected)


def test_the_papers_schedule_and_rates(task):
    others = ("--text-model", "bert-base-uncased", "--image-model", "timm/vit_base_patch16_224")
    made = task("--epochs", "10", "--schedule", "steps", *others)
    assert (made.args.head_lr, made.args.dropout, made.args.prompt_init) == (None, 0.1, None)
    optimizer, schedule = made.optimizer(steps_per_epoch=2)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 4e-4]
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([5e-4] * 6 + [2e-4] * 6 + [8e-5] * 8)
    image_first = task("--main", "image", *others).optimizer(1)[0]
    assert [group["initial_lr"] for group in image_first.param_groups] == [4e-4, 5e-4]


def test_small_encoders_have_rates_of_their_own(task):
    made = task()
    assert (made.args.lr, made.args.complementary_lr, made.args.head_lr) == (1e-3, 4e-4, 5e-3)
    assert (made.model.config.dropout, made.model.config.prompt_init) == (0.0, 0.06)
    assert task("--lr", "2e-3", "--dropout", "0.3").model.config.dropout == 0.3


def test_settings_reach_the_model(task):
    settings = {"experts": 3, "prompt-length": 2, "complementary-prompt-length": 5, "importance-weight": 0.5}
    settings |= {"dropout": 0.2, "noise-std": 0.25, "prompt-init": 0.75, "mapper-norm": "layer"}
    config = task(*[f"--{name}={value}" for name, value in settings.items()]).model.config
    names = {"experts": "num_experts"}
    assert {name: getattr(config, names.get(name, name.replace("-", "_"))) for name in settings} == settings


def test_what_the_paper_leaves_out_can_be_left_out(task):
    off = task("--no-static", "--no-mapped", "--top-k", "2", "--learn-keys", "--temperature", "0.5", "--head-inputs", "main")
    config = off.model.config
    assert (config.use_static, config.use_dynamic, config.use_mapped) == (False, True, False)
    assert (config.top_k, config.learn_keys, config.temperature, config.head_inputs) == (2, True, 0.5, "main")
    assert not hasattr(task("--no-dynamic").model.bank, "keys")
    poolings = task("--main", "image", "--pooling", "mean", "--router-pooling", "mean").model.config
    assert (poolings.pooling, poolings.router_pooling, poolings.complementary_pooling) == ("mean", "mean", "mean")
    frozen = task("--complementary", "frozen").model
    assert (frozen.config.pooling, frozen.complementary.pooling) == ("mean", None)


@pytest.mark.parametrize(
    ("words", "started"), [((), {"complementary.bank.stacks.48.static_prompt"}), (("--complementary", "frozen"), set())]
)
def test_image_prompts_start_at_tokens_and_the_head_is_fitted_first(task, words, started):
    plain, fitted = task(*words), task(*words, "--head-epochs", "3", "--batch-size", "8")
    for made in (plain, fitted):
        made.fit_head()
    before = plain.model.state_dict()
    changed = {name for name, value in fitted.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"} | started


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "17"], "--top-k must be 1 to --experts (16), got 17"),
        (["--no-static", "--no-dynamic", "--no-mapped"], "leaves no prompt"),
        (["--temperature", "0"], "--temperature must be a finite number > 0"),
    ],
)
def test_switches_that_can_not_work_are_refused(words, message, task, capsys):
    with pytest.raises(SystemExit):
        task(*words)
    assert message in capsys.readouterr().err


def test_metrics_of_either_kind(task, tmp_path):
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1.0]])
    made, labels = task(), torch.tensor([0, 1, 2, 2])
    assert made.chosen_by == "accuracy"
    f1 = [1.0, 2 / 3, 2 / 3]
    assert made.metrics(logits, labels) == pytest.approx({"accuracy": 0.75, "f1_macro": sum(f1) / 3, "f1_micro": 0.75})
    folder = tiny_task.write_folder(tmp_path / "several", multi_label=True)
    parser = task_arguments.argument_parser("", "")
    several = jsonl_task.load_task(task_arguments.check(parser, parser.parse_args([str(folder)])))
    assert several.chosen_by == "f1_macro"
    assert several.model.problem_type == "multi_label_classification"
    several_labels = torch.nn.functional.one_hot(labels)
    assert several.metrics(logits, several_labels) == pytest.approx(
        {"accuracy": 1 / 2, "f1_macro": (1 + 1 / 2 + 2 / 3) / 3, "f1_micro": 6 / (6 + 2 + 1)}
    )


def test_training_batches_are_all_of_one_size_unless_there_is_but_one(task):
    made = task("--batch-size", "16")
    assert [len(batch["labels"]) for batch in made.loader("train")] == [16, 16]
    assert [len(batch["labels"]) for batch in made.loader("test")] == [10]
    first, second = (torch.cat([batch["labels"] for batch in made.loader("train")]) for _ in range(2))
    assert torch.equal(first, second)
    assert [len(batch["labels"]) for batch in task("--batch-size", "64").loader("train")] == [40]


def test_complementary_forms(task, tmp_path):
    prompted = task("--complementary-prompt-length", "3")
    assert prompted.model.complementary.bank.config.prompt_length == 3
    frozen = task("--complementary", "frozen", "--output", str(tmp_path / "out"))
    assert type(frozen.model.complementary).__name__ == "FeatureCache"
    assert all(not name.startswith("complementary") for name in frozen.model.trained_state_dict())


def test_files_are_replaced_whole(tmp_path):
    from files import write_atomically

    file = tmp_path / "results.json"
    for text in ("old", "new"):
        write_atomically(file, text)
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_easy_vqa_becomes_lines(tmp_path, monkeypatch, capsys):
    from easy_vqa_data import Split

    answers = ["circle", "no", "red", "yes"]
    pictures = []
    for i in range(3):
        pictures.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(pictures[-1])
    questions = ["what color?", "what shape?", "is it red?", "is it blue?"]
    # of picture 0 color and shape are told, of picture 1 the color alone, of picture 2 nothing
    train = Split(
        [*questions, questions[0], questions[2]], torch.tensor([2, 0, 3, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 1, 2]), pictures
    )
    monkeypatch.setattr(easy_vqa_jsonl, "easy_vqa", lambda: (train, train, answers))
    monkeypatch.setattr(easy_vqa_jsonl, "VALIDATION_IMAGES", 2)

    def lines(folder, split):
        return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]

    easy_vqa_jsonl.main([str(tmp_path / "one")])
    assert "one/train.jsonl: 4 questions" in capsys.readouterr().out
    assert (tmp_path / "one" / "labels.txt").read_text().split() == answers
    found = {(row["text"], row["label"], row["img"]) for row in lines(tmp_path / "one", "train")}
    labels = ["red", "circle", "yes", "no"]
    assert found == {(text, label, "images/train/0.png") for text, label in zip(questions, labels, strict=True)}
    assert {row["img"] for row in lines(tmp_path / "one", "val")} == {"images/train/1.png", "images/train/2.png"}
    assert (tmp_path / "one" / "images" / "test" / "2.png").read_bytes() == pictures[2].read_bytes()

    easy_vqa_jsonl.main([str(tmp_path / "several"), "--multi-label", "--samples", "3"])
    assert (tmp_path / "several" / "labels.txt").read_text().split() == ["circle", "red"]
    rows = lines(tmp_path / "several", "test")
    assert len(rows) == 3
    assert all(row["label"] == ["circle", "red"] and row["img"] == "images/test/0.png" for row in rows)


def test_check_fills_in_rates_and_refuses_a_file_as_folder(tmp_path, capsys):
    parser = task_arguments.argument_parser("", "")
    args = task_arguments.check(parser, parser.parse_args([str(tmp_path)]))
    assert isinstance(args, argparse.Namespace)
    assert (args.lr, args.complementary_lr, args.folder) == (1e-3, 4e-4, Path(tmp_path))
    with pytest.raises(SystemExit):
        task_arguments.check(parser, parser.parse_args([str(tmp_path), "--samples", "1"]))
    assert "--samples must be at least 2, got 1" in capsys.readouterr().err
