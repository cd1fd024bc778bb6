"""Tests of the study on tiny random encoders: its baselines by their definitions, its splits, resumed cells and statistics."""

import base64
import io
import json
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from benchmarks.baselines.prompt_fusion import PMF, PromptFuse
from benchmarks.study import __main__ as study
from benchmarks.study import cells, data, items, methods, page, training


def bert(width=24):
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return BertModel(config).double().eval()


def dinov2(width=16):
    config = Dinov2Config(hidden_size=width, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4)
    return Dinov2Model(config).double().eval()


def text(batch=3, tokens=6):
    mask = torch.arange(tokens) < torch.tensor([6, 3, 5])[:batch, None]
    return {"input_ids": torch.randint(1, 50, (batch, tokens)), "attention_mask": mask}


def test_pmf_without_prompts_influence_is_both_encoders_as_they_are():
    model = PMF(bert(), dinov2(), torch.nn.Linear(40, 5), layers=2, length=1, bottleneck=8).double()
    inputs, pictures = text(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for encoder in (model.text, model.image):  # attention outputs zero, so prompts have no effect
        layers = encoder.encoder.layer
        for layer in layers:
            attention = layer.attention.self if hasattr(layer.attention, "self") else layer.attention
            value = getattr(attention, "value", None) or attention.v_proj
            torch.nn.init.zeros_(value.weight)
            torch.nn.init.zeros_(value.bias)
    features = model.text(**inputs).last_hidden_state[:, 0], model.image(pictures).last_hidden_state[:, 0]
    torch.testing.assert_close(model(inputs, pictures), model.head(torch.cat(features, dim=1)))


def test_pmf_is_its_two_stages_one_sample_at_a_time():
    model = PMF(bert(), dinov2(), torch.nn.Linear(40, 5), layers=1, length=2, bottleneck=8).double()
    inputs, pictures = text(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    got = model(inputs, pictures)
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        ids = inputs["input_ids"][i : i + 1, :length]
        words = model.text(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        patches = model.image(pictures[i : i + 1], output_hidden_states=True).hidden_states[-2]
        prompts = {name: prompt[0][None] for name, prompt in model.prompts.items()}
        last = {"text": model.text.encoder.layer[-1], "image": model.image.encoder.layer[-1]}
        tokens = {"text": words, "image": patches}
        asked = {
            side: last[side](torch.cat([seen, prompts[f"{side}_query_context"], prompts[f"{side}_query"]], 1))[:, -2:]
            for side, seen in tokens.items()
        }
        told = {"text": model.told["image_to_text"][0](asked["image"]), "image": model.told["text_to_image"][0](asked["text"])}
        fused = {
            side: last[side](torch.cat([seen, prompts[f"{side}_fusion_context"], told[side]], 1)) for side, seen in tokens.items()
        }
        text_logits = torch.nn.functional.linear(fused["text"][:, 0], model.head.weight[:, :24])
        expected = text_logits + torch.nn.functional.linear(model.image.layernorm(fused["image"])[:, 0], model.head.weight[:, 24:])
        expected = expected + model.head.bias
        torch.testing.assert_close(got[i : i + 1], expected)


def test_pmf_trains_every_prompt_and_neither_encoder():
    model = PMF(bert(), dinov2(), torch.nn.Linear(40, 5), layers=2, length=2, bottleneck=8).double().train()
    model(text(), torch.randn(3, 3, 8, 8, dtype=torch.float64)).sum().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("text.", "image."))
        assert (parameter.grad is None) == frozen, name
    assert not model.text.training


def test_promptfuse_puts_feature_and_prompts_before_the_words():
    model = PromptFuse(bert(), torch.nn.Linear(24, 5), length=3).double()
    inputs, feature = text(), torch.randn(3, 48, dtype=torch.float64)
    got = model(inputs, feature)
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        words = model.text.embeddings.word_embeddings(inputs["input_ids"][i : i + 1, :length])
        embeds = torch.cat([feature[i].view(1, 2, 24), model.prompts[None], words], dim=1)
        expected = model.head(model.text(inputs_embeds=embeds).last_hidden_state[:, 5])
        torch.testing.assert_close(got[i : i + 1], expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["prompts", "head.weight", "head.bias"]


def icon(color):
    file = io.BytesIO()
    Image.new("RGBA", (36, 32), color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def record(number, name, sentence, color, slot="head", weapon=None, **more):
    flags = {"noted": False, "placeholder": False, "duplicate": False, "equipable_by_player": True}
    rest = {"equipment": {"slot": slot}, "weapon": weapon and {"weapon_type": weapon}}
    return {"id": number, "name": name, "examine": sentence, "icon": icon(color), **flags, **rest, **more}


def test_items_are_read_and_those_that_belong_together_are_one_family(tmp_path):
    file = tmp_path / items.FILE
    file.parent.mkdir(parents=True)
    records = [
        record(1, "Red hat", "It is red.", "red"),
        record(2, "Red hat (2)", "A newer one.", "blue"),  # by its name
        record(3, "Cap", "A newer one.", "green"),  # by its sentence
        record(4, "Sword", "Sharp.", "black", "weapon", "slash_sword"),
        record(5, "Noted sword", "Sharp.", "black", noted=True),
        record(6, "Stone", "Heavy.", "grey", equipable_by_player=False),
    ]
    file.write_text(json.dumps({str(row["id"]): row for row in records}))
    rows = items.read_items(tmp_path)
    assert [row.id for row in rows] == [1, 2, 3, 4]
    assert (rows[3].slot, rows[3].weapon) == ("weapon", "slash_sword")
    family = items.families(rows)
    assert family[0] == family[1] == family[2] != family[3]
    assert items.picture(rows[0]).size == (36, 36)
    assert items.picture(rows[0]).getpixel((0, 0)) == (255, 255, 255)


def test_no_family_is_on_two_sides_and_none_is_tested_twice_or_chosen_by():
    families = [index // 3 for index in range(300)]
    split = data.by_family(families, lambda index: data.Samples(*(torch.tensor(index),) * 3))
    parts = [split(seed) for seed in range(data.FOLDS)]
    sides = [[{families[index] for index in side.texts.tolist()} for side in (part.train, part.dev, part.test)] for part in parts]
    for train, dev, test in sides:
        assert len(train) + len(dev) + len(test) == len(train | dev | test) == 100
        assert dev == sides[0][1], "one part for all choices"
    assert sum(len(test) for _, _, test in sides) == 85
    assert set().union(*(test for _, _, test in sides)) == set(range(100)) - sides[0][1]
    assert split(data.FOLDS).test.texts.tolist() != parts[0].test.texts.tolist(), "folds are drawn anew"
    assert split(data.FOLDS).dev.texts.tolist() == parts[0].dev.texts.tolist()


@pytest.fixture
def tiny(monkeypatch):
    """Return a task of random texts and pictures on tiny encoders, whose class the text determines."""
    count = 120
    ids = torch.randint(4, 50, (count, 6))
    labels = torch.arange(count) % 2
    ids[:, 1] = 1 + labels
    pictures = torch.randint(0, 255, (count, 3, 8, 8), dtype=torch.uint8)
    split = data.by_family(range(count), lambda index: data.Samples(*(torch.tensor(index),) * 2, labels[torch.tensor(index)]))
    features = torch.randn(count, 24), torch.randn(count, 48)
    task = data.Task("tiny", ids, torch.full((count,), 6), pictures, *features, ("a", "b"), split)
    modules = {
        "pretrained": SimpleNamespace(minilm=lambda: (bert().float(), None), dinov2_small=lambda: dinov2(24).float()),
        # all of its texts have the same length
        "easy_vqa_data": SimpleNamespace(
            normalised=lambda pictures: pictures / 255, of_like_length=lambda order, lengths, size: list(order.split(size))
        ),
    }
    for module in (data, methods):
        monkeypatch.setattr(module, "example", modules.__getitem__)
    monkeypatch.setitem(data.TASKS, "tiny", (lambda name, size: task, 8, "for tests"))
    return task


RECIPE = methods.Recipe(2, 1e-3, 1e-2, dropout=0.0, batch_size=16)


QUICK = {
    ("majority", "text"), ("mlp", "text"), ("sequential", "text"), ("pmf", "text"), ("promptfuse", "text"), ("lora", "image"),
    ("mope-4", "image"), ("longer", "text"),
}  # fmt: skip
"""Other methods differ from these in one setting."""
ROUTED = {"dynamic-only", "no-importance", "learned-keys", "top-1"}


@pytest.mark.parametrize(
    ("name", "main"),
    [
        pytest.param(name, main, marks=() if (name, main) in QUICK else pytest.mark.slow)
        for name, method in methods.METHODS.items()
        for main in (method.mains if method.encodes else ["text"])
    ],
)
def test_every_method_trains_and_a_seed_gives_the_same_again(name, main, tiny):
    if name == "lora":
        pytest.importorskip("peft")
    split = tiny.split(0)
    found = training.train(tiny, split, name, main, RECIPE, 0, test=True)
    assert 0 <= found.test <= 1
    assert len(found.losses) == (0 if name == "majority" else 2)
    assert (found.routing is not None) == (name.startswith(("mope-4", "mope-16", "default")) or name in ROUTED)
    if found.routing:
        assert [sum(row) for row in found.routing.by_class] == pytest.approx([1, 1], abs=1e-3)
    if name in ("majority", "mlp", "mope-4"):
        again = training.train(tiny, split, name, main, RECIPE, 0, test=False)
        assert (again.test, again.dev, again.losses, again.epoch) == (None, found.dev, found.losses, found.epoch)
    if name == "longer":
        sixteen = training.train(tiny, split, "mope-16", main, RECIPE, 0, test=False)
        # a router over one expert has fewer key dimensions to train, and nothing else differs
        assert abs(found.trained_parameters - sixteen.trained_parameters) < 0.01 * sixteen.trained_parameters


def test_a_study_goes_on_where_it_was_stopped_and_says_what_was_not_run(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cells, "TRIALS", {kind: [RECIPE] * 1 for kind in (True, False)})
    trained = []
    once = training.train

    def counted(*arguments, **settings):
        trained.append((arguments[2], settings["test"]))
        return once(*arguments, **settings)

    monkeypatch.setattr(study, "train", counted)
    words = ["tiny", "--results", str(tmp_path), "--splits", "2", "--methods"]
    study.main([*words, "mlp", "sequential"])
    assert sorted(trained) == [("mlp", False), *[("mlp", True)] * 2, ("sequential", False), *[("sequential", True)] * 2]
    study.main([*words, "mlp", "sequential"])
    assert len(trained) == 6, "nothing is run twice"
    study.main([*words, "mlp", "sequential", "mope-4", "--hours", "0"])
    *_, mlp, sequential, mope = capsys.readouterr().out.splitlines()
    assert mlp.startswith("MLP on both frozen features")
    assert " 2 " in sequential
    assert mope.split() == ["MoPE,", "K=4", "not", "run"]
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"tiny.jsonl, line 7 is not a cell of benchmarks.study"):
        study.main([*words, "mlp"])


def test_the_epoch_that_dev_chooses_is_what_is_tested(tiny, monkeypatch):
    """The first of three epochs is the best on dev, and its weights are tested."""
    seen, weights = iter([0.9, 0.2, 0.1, 0.5]), []

    def accuracy(model, batches, samples):
        weights.append(model.head[-1].weight.detach().clone())
        return next(seen)

    monkeypatch.setattr(training, "accuracy", accuracy)
    found = training.train(tiny, tiny.split(0), "mlp", "text", replace(RECIPE, epochs=3), 0, test=True)
    assert (found.dev, found.test, found.epoch) == (0.9, 0.5, 1)
    assert torch.equal(weights[3], weights[0])
    assert not torch.equal(weights[3], weights[2])


def test_the_head_alone_is_an_epoch_too(tiny):
    recipe = replace(RECIPE, lr=0.0, head_lr=0.0, head_epochs=20)
    found = training.train(tiny, tiny.split(0), "sequential", "text", recipe, 0, test=True)
    assert found.epoch == 2, "later ones of equals"
    assert found.losses[1] < 0.6, "the class is told by the text"


def test_another_recipe_is_another_row(tiny):
    rows = [
        {"cell": cells.Cell("t", None, "mlp", split, recipe, True).as_dict(), "found": {"test": value}}
        for split, recipe, value in ((0, RECIPE, 0.1), (1, RECIPE, 0.2), (0, replace(RECIPE, epochs=9), 0.7))
    ]
    assert {split: found["test"] for split, found in cells.final_cells(rows, "t", "mlp", "text", RECIPE).items()} == {
        0: 0.1,
        1: 0.2,
    }


def _add(path, start):
    store = cells.Store(path)
    for split in range(start, start + 20):
        store.add(cells.Cell("t", None, "mlp", split, RECIPE, True), {"test": 0.5}, {})


def test_two_processes_lose_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_add, args=(tmp_path / "t.jsonl", start)) for start in (0, 100)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(cells.Store(tmp_path / "t.jsonl").rows()) == 40


def test_intervals_are_students():
    found = cells.interval([0.01, 0.02, 0.06])
    assert found.mean == pytest.approx(0.03)
    assert found.half == pytest.approx(4.302653 * 0.0264575 / 3**0.5, rel=1e-5)
    assert str(cells.interval([0.5])) == "+50.0 (one split)"
    wider = cells.interval([0.01, 0.02, 0.06], overlap=0.25)
    assert wider.half == pytest.approx(found.half * (1 / 3 + 1 / 4) ** 0.5 * 3**0.5)


def test_differences_are_of_the_same_splits():
    mlp, mope = ({split: {"test": value} for split, value in enumerate(values)} for values in ([0.5, 0.6, 0.1], [0.6, 0.8]))
    found = cells.difference(mope, mlp, folds=True)
    assert (found.count, found.mean) == (2, pytest.approx(0.15))
    assert found.half > cells.difference(mope, mlp, folds=False).half
    assert cells.difference({}, mlp, folds=True) is None


def test_the_page_and_its_pictures_are_of_the_kept_cells():
    measured = page.Measured(page.RESULTS)
    text = page.PAGE.read_text()
    assert page.filled(text, measured) == text, "python -m benchmarks.study.page writes it anew"
    for name in page.PICTURES:
        assert measured.digest in (page.PAGE.parent / name).read_text(), name


def row(method, split, test, tests=True, dev=0.5):
    main = cells.main_of(method, "text")
    recipe = cells.TRIALS[methods.METHODS[method].encodes][1]
    routing = {
        "entropy": [0.5, 0.4], "information": [0.3, 0.2], "class_information": [0.1, 0.2], "layer": 1, "class_names": ["a", "b"],
        "by_class": [[0.9, 0.1], [0.2, 0.8]],
    }  # fmt: skip
    found = {
        "dev": dev,
        "test": test,
        "epoch": 1,
        "trained_parameters": 1000,
        "step_ms": 10.0 + split,
        "seconds": 36.0,
        "routing": routing,
    }
    facts = {"device": "CPU 1", "torch": "2", "date": "2026-01-01", "commit": "abc"}
    return {"cell": cells.Cell("items-slot", main, method, split, recipe, tests).as_dict(), "found": found, **facts}


def test_a_page_of_made_up_cells_says_who_is_ahead(tmp_path, capsys):
    rows = [row("mlp", split, 0.80 + 0.01 * split) for split in range(3)]
    rows += [row("mope-16", split, 0.85 + 0.01 * split) for split in range(3)]
    rows += [row("sequential", split, value) for split, value in enumerate((0.85, 0.80, 0.90))]
    for each in rows[-3:]:
        each["found"]["step_ms"] = None
    for method in ("mlp", "mope-16", "sequential"):
        trials = cells.searched("items-slot", method, "text")
        rows += [
            {**row(method, 0, None, dev=0.9 if index == 1 else 0.1), "cell": trial.as_dict()} for index, trial in enumerate(trials)
        ]
    (tmp_path / "items-slot.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    file = tmp_path / "page.md"
    marks = ("verdict", "differences", "routing", "experts", "facts", "table items-slot text")
    file.write_text("# Mine\n\n" + "\n".join(f"<!-- {mark} -->\nstale\n<!-- end -->\n" for mark in marks))
    page.main(["--results", str(tmp_path), "--page", str(file)])
    text = file.read_text()
    assert "stale" not in text
    assert text.count("| 1,000 | 11.0 |") == 2
    assert text.count("| 1,000 | not timed |") == 1, "of steps beside other programs"
    assert "- MoPE, K=16, against MLP on both frozen features: ahead on items-slot, text as main (+5.0)." in text
    assert "- MoPE, K=16, against static and mapped prompts: not told apart on items-slot, text as main (+1.0)." in text
    assert "- LoRA r=8 on the main encoder, against MLP on both frozen features: not compared on items-slot, text as main." in text
    assert "| MoPE, K=16 | 86.0 | +5.0 (+5.0 to +5.0) | 3 | 1, 1, 1 | 1,000 | 11.0 |" in text
    assert "| MoPE, K=1 | not run | | | | | |" in text
    assert "| items-slot, text as main | 0.40 - 0.50 | 0.20 - 0.30 | 0.10 - 0.20 |" in text
    assert "| b | 2: 0.80, 1: 0.20 |" in text
    assert "18 cells, 9 of them final, 0.2 core-hours; device CPU 1; torch 2; date 2026-01-01; commit abc" in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in page.PICTURES)
    file.write_text("# Mine\n")
    with pytest.raises(ValueError, match="the page must have marks for"):
        page.main(["--results", str(tmp_path), "--page", str(file)])
