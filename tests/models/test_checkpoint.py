import hashlib
import json
import math
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fusion import CLASSES, SETTINGS, WIDTHS, make_bert, make_dinov2, make_images, make_text
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned
from mope_fast.models import checkpoint


def bert(**settings):
    torch.manual_seed(1)
    return make_bert(**settings).float()


def dinov2(**settings):
    torch.manual_seed(2)
    return make_dinov2(**settings).float()


def make_model(seed=0, *, head=None, num_classes=CLASSES, **settings):
    main, complementary = bert(), dinov2()
    torch.manual_seed(seed)
    num_classes = num_classes if head is None else None
    return MoPEFusion(main, complementary, num_classes, MoPEConfig(**{**SETTINGS, **settings}), head=head).eval()


def logits(model):
    torch.manual_seed(3)
    return model(make_text(6), make_images(6).float()).logits


def make_head():
    return nn.Sequential(nn.Linear(WIDTHS["bert"], 7), nn.Linear(7, 2))


@pytest.fixture
def saved(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


def weights_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite_description(folder, change):
    file = folder / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))


def rewrite_weights(folder, change):
    """Another set of tensors, under the name that its content gives it."""
    old = weights_file(folder)
    state = load_file(old)
    old.unlink()
    change(state)
    save_file(state, folder / "new")
    name = f"mope_fast-{hashlib.sha256((folder / 'new').read_bytes()).hexdigest()[:16]}.safetensors"
    (folder / "new").rename(folder / name)
    rewrite_description(folder, lambda description: description.update(weights=name))


@pytest.mark.parametrize(
    "settings", [{}, {"learn_keys": True, "mapper_norm": "layer"}, {"complementary_prompt_length": 0, "top_k": 1}]
)
def test_a_reloaded_model_gives_bitwise_the_same_logits(tmp_path, settings):
    model = make_model(**settings).train()
    # statistics of the batch norm are part of what is saved
    model(make_text(6), make_images(6).float())
    model.eval().save_pretrained(tmp_path)
    loaded = MoPEFusion.from_pretrained(tmp_path, bert(), dinov2())
    assert not loaded.training
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(make_model(seed=5, **settings)), logits(model))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_problem_type_is_saved(tmp_path, problem_type):
    MoPEFusion(bert(), dinov2(), 2, MoPEConfig(**SETTINGS), problem_type=problem_type).save_pretrained(tmp_path)
    assert MoPEFusion.from_pretrained(tmp_path, bert(), dinov2()).problem_type == problem_type


def test_only_trained_parts_are_saved(saved):
    model = make_model()
    state = load_file(weights_file(saved))
    assert state.keys() == model.trained_state_dict().keys()
    assert not any(".encoder." in key for key in state)
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= state.keys()
    assert weights_file(saved).stat().st_size < 1.1 * sum(t.nbytes for t in state.values()) + 4096


def test_own_head_is_saved_and_wanted_back(tmp_path):
    torch.manual_seed(4)
    model = make_model(head=make_head())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head: saved with Sequential, got None"):
        MoPEFusion.from_pretrained(tmp_path, bert(), dinov2())
    with pytest.raises(ValueError, match="head: saved with Sequential, got Linear"):
        MoPEFusion.from_pretrained(tmp_path, bert(), dinov2(), head=nn.Linear(WIDTHS["bert"], 2))
    assert torch.equal(logits(MoPEFusion.from_pretrained(tmp_path, bert(), dinov2(), head=make_head())), logits(model))


def test_a_model_without_head_is_saved_as_one(tmp_path):
    make_model(num_classes=None).save_pretrained(tmp_path)
    assert MoPEFusion.from_pretrained(tmp_path, bert(), dinov2()).head is None


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        (lambda: (dinov2(), dinov2()), r"main: saved with .*'bert'.*got .*'dinov2'"),
        (lambda: (dinov2(), bert()), "cross_dim is 48, but BertModel gives features of width 32"),
        (lambda: (bert(hidden_size=40), dinov2()), r"main: saved with .*\[32, 32\].*got .*\[40, 40\]"),
        (lambda: (bert(num_hidden_layers=3), dinov2()), r"main: saved with .*\[32, 32\].*got .*\[32, 32, 32\]"),
        (lambda: (bert(), dinov2(num_hidden_layers=1)), r"complementary: saved with .*got .*\[48\]"),
        (lambda: (bert(), dinov2(hidden_size=24)), r"cross_dim is 48, but Dinov2Model gives features of width 24"),
        (lambda: (bert(), None), r"complementary: saved with .*'dinov2'.*got None"),
    ],
)
def test_other_encoders_are_refused_with_the_difference_and_given_back(saved, encoders, message):
    main, complementary = encoders()
    with pytest.raises(ValueError, match=message):
        MoPEFusion.from_pretrained(saved, main, complementary)
    MoPEFusion(main, complementary, 2, MoPEConfig(cross_dim=None if complementary else 48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), "missing: head.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda state: state.update({"head.bias": torch.zeros(9)}), r"head.bias: saved \(9,\), expected \(5,\)"),
        (
            lambda state: state.update({"head.bias": torch.zeros(5).long()}),
            r"head.bias: saved as torch.int64, expected torch.float32",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(saved, change, message):
    rewrite_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


def test_every_difference_is_listed_at_once(saved):
    rewrite_weights(saved, lambda state: (state.pop("head.bias"), state.update(extra=torch.zeros(1))))
    with pytest.raises(ValueError, match=r"missing: head\.bias") as error:
        MoPEFusion.from_pretrained(saved, bert(), dinov2(num_hidden_layers=1))
    assert all(part in str(error.value) for part in ("unexpected: extra", "complementary: saved with"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["config"].update(num_experts=7), r"bank.keys: saved \(2, 4, 5\), expected \(2, 7, 5\)"),
        (lambda d: d["config"].update(temperature=-1.0), "temperature must be > 0, got -1.0"),
        (lambda d: d["config"].update(future_setting=1), "future_setting"),
        (lambda d: d.update(num_classes=9), r"head.weight: saved \(5, 80\), expected \(9, 80\)"),
        (lambda d: d.update(format=3), "has format 3, expected 2"),
        (lambda d: d.pop("format"), "has format None, expected 2"),
        (lambda d: d.pop("config"), "config"),
        (lambda d: d.pop("weights"), "weights"),
        (lambda d: d.pop("main"), "main"),
        (lambda d: d["config"].update(noise_std=[1]), "mope_fast.json is damaged: MoPEConfig.noise_std must be float"),
        (
            lambda d: d["config"].update(prompt_length=10**12),
            r"is damaged: \['prompt_length'\] are larger than the size of mope_fast-\w+\.",
        ),
        (lambda d: d["config"].update(prompt_init=10**40), "prompt_init must be finite in float32"),
        (lambda d: d.update(num_classes=10**40), r"is damaged: \['num_classes'\] are larger than"),
        (lambda d: d.update(num_classes=True), r"is damaged: \['num_classes'\] have the wrong type"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved, change, message):
    rewrite_description(saved, change)
    main, complementary = bert(), dinov2()
    with pytest.raises(ValueError, match=message):
        MoPEFusion.from_pretrained(saved, main, complementary)
    MoPEFusion(main, complementary, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "has format 'list', expected 2"),
        ('{"model_type": "bert"}', "has format None"),
        ('{"config":' * 100_000, "is not JSON"),
    ],
)
def test_another_programs_json_is_refused(saved, text, message):
    (saved / checkpoint.DESCRIPTION).write_text(text)
    with pytest.raises(ValueError, match=message):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*mope_fast.json does not exist"):
        MoPEFusion.from_pretrained(tmp_path / "nowhere", bert(), dinov2())
    weights_file(saved).unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors does not exist, but mope_fast.json names it"):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


def flip_last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 255])


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: data[:-4], flip_last_byte])
def test_damaged_weights_are_refused(saved, damage):
    file = weights_file(saved)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged.*save the model again"):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


@pytest.mark.parametrize("dtype", ["F32", "F4"])
def test_weights_of_a_name_that_fits_and_a_header_that_lies_are_refused(saved, dtype):
    header = json.dumps({"head.bias": {"dtype": dtype, "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    name = f"{checkpoint._content_name(data)}.safetensors"
    (saved / name).write_bytes(data)
    rewrite_description(saved, lambda description: description.update(weights=name))
    with pytest.raises(ValueError, match=rf"{name} is not a safetensors file \("):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_classes": True}, "['num_classes'] have the wrong type"),
        ({"label_smoothing": math.nan}, "label_smoothing must be in 0..1, got nan"),
        ({"problem_type": "other"}, "problem_type must be one of"),
        ({"config": {"prompt_length": 2, "dropout": "0.1", "prompt_init": None}}, "dropout must be float, got '0.1'"),
        ({"num_classes": 10**12}, "['num_classes'] are larger than the size of mope_fast-"),
        ({"config": {"prompt_length": 10**30, "dropout": 0.1, "prompt_init": None}}, "['prompt_length'] are larger than"),
        ({"weights": "a" * 400}, "names 'aaa"),
        ({"weights": "a\0b"}, "names 'a"),
        ({"weights": "../mope_fast-0123456789abcdef.safetensors"}, "names '../mope_fast"),
    ],
)
def test_settings_that_are_none_are_the_saves_fault(tmp_path, changed, message):
    PromptTuned(bert(), 2, 3).save_pretrained(tmp_path)
    rewrite_description(tmp_path, lambda description: description.update(changed))
    with pytest.raises(ValueError, match=rf"mope_fast\.json.*{re.escape(message)}"):
        PromptTuned.from_pretrained(tmp_path, bert())


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_kill_while_saving_leaves_the_old_save(saved, monkeypatch, calls_before):
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) > calls_before:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make_model(seed=5).save_pretrained(saved)
    monkeypatch.undo()
    assert len(calls) == calls_before + 1
    assert torch.equal(logits(MoPEFusion.from_pretrained(saved, bert(), dinov2())), logits(make_model()))


def test_a_kill_before_old_weights_are_dropped_leaves_the_new_save(saved, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_model(seed=5).save_pretrained(saved)
    assert torch.equal(logits(MoPEFusion.from_pretrained(saved, bert(), dinov2())), logits(make_model(seed=5)))


def test_saving_again_leaves_one_weights_file(saved):
    make_model(seed=5).save_pretrained(saved)
    assert sorted(file.suffix for file in saved.iterdir()) == [".json", ".safetensors"]
    assert torch.equal(logits(MoPEFusion.from_pretrained(saved, bert(), dinov2())), logits(make_model(seed=5)))


def test_saving_the_same_model_again_changes_nothing(saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    make_model().save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_folders_are_made_on_the_way(tmp_path):
    make_model().save_pretrained(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / checkpoint.DESCRIPTION).is_file()


def test_a_save_is_read_into_a_model_that_is_there(saved):
    model = make_model(seed=5, dropout=0.3, noise_std=0.0, importance_weight=0.2).train()
    encoder = model.main.encoder
    model.load_pretrained(saved)
    assert model.training
    assert model.main.encoder is encoder
    assert model.config.dropout == 0.3
    assert torch.equal(logits(model.eval()), logits(make_model()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.2}, r"config\.temperature: saved with 0\.1, got 0\.2"),
        ({"top_k": 2}, r"config\.top_k: saved with None, got 2"),
        ({"num_experts": 7}, r"config\.num_experts: saved with 4, got 7.*bank\.keys: saved \(2, 4, 5\), expected \(2, 7, 5\)"),
        ({"num_classes": 3}, r"head\.weight: saved \(5, 80\), expected \(3, 80\)"),
        ({"head": make_head()}, r"head: saved with Linear, got Sequential"),
    ],
)
def test_a_save_that_does_not_fit_changes_nothing(saved, settings, message):
    model = make_model(seed=5, **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.load_pretrained(saved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_save_of_another_loss_or_class_is_not_read_into_a_model(saved):
    model = MoPEFusion(bert(), dinov2(), CLASSES, MoPEConfig(**SETTINGS), problem_type="regression")
    with pytest.raises(ValueError, match="problem_type: saved with single_label_classification, got regression"):
        model.load_pretrained(saved)
    with pytest.raises(ValueError, match="was saved by MoPEFusion, not by PromptTuned"):
        PromptTuned(bert(), 2, CLASSES).load_pretrained(saved)


# several processes, one folder


def save_number(folder, number):
    description = {**dict.fromkeys(checkpoint.KEYS), "model": "MoPEFusion", "config": {}, "problem_type": "regression"}
    checkpoint.save(folder, {"weight": torch.full((3,), float(number))}, description)


def saved_number(folder):
    """Of the save that the description names; fails if its weights are gone or others'."""
    description = json.loads((folder / checkpoint.DESCRIPTION).read_bytes())
    weights = folder / description["weights"]
    assert checkpoint._is_name_of(weights.name, weights.read_bytes())
    return int(load_file(weights)["weight"][0])


class Interrupted:
    """Does something else before the n-th operation on files of what runs inside."""

    operations = ((os, "replace"), (os, "open"), (Path, "unlink"), (Path, "read_bytes"), (Path, "exists"), (Path, "glob"))

    def __init__(self, monkeypatch, at, action):
        self.count, self.at, self.action, self.patch = 0, at, action, monkeypatch

    def __enter__(self):
        self.context = self.patch.context()
        patch = self.context.__enter__()
        for owner, name in self.operations:
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def _wrapped(self, operation):
        def call(*arguments, **settings):
            self.count += 1
            if self.count == self.at:
                self.action()
            return operation(*arguments, **settings)

        return call


@pytest.mark.parametrize("others", [[0], [1], [2, 0]])
@pytest.mark.parametrize("empty", [False, True])
def test_a_save_between_any_two_steps_of_another_never_loses_weights(tmp_path, monkeypatch, others, empty):
    """The folder holds 0 or nothing, one saves 1, others come in between, also with these very contents; clocks run ahead."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def save_others(folder):
        for number in others:
            save_number(folder, number)
            assert saved_number(folder) == number

    at = steps = 1
    while at <= steps:
        folder = tmp_path / str(at)
        folder.mkdir()
        if not empty:
            save_number(folder, 0)
        with Interrupted(monkeypatch, at, lambda folder=folder: save_others(folder)) as outer:
            save_number(folder, 1)
        steps = outer.count
        assert saved_number(folder) in (1, others[-1])
        save_number(folder, 3)
        assert saved_number(folder) == 3
        assert len(list(folder.iterdir())) == 2
        at += 1
    assert steps > 8


def test_a_save_published_while_another_one_drops_what_it_replaced_keeps_its_weights(tmp_path, monkeypatch):
    replace = os.replace
    at = steps = 1
    while at <= steps:
        folder, published = tmp_path / str(at), []
        save_number(folder, 0)
        with monkeypatch.context() as context:

            def publish_later(source, target, published=published):
                published.append((source, target)) if target.name == checkpoint.DESCRIPTION else replace(source, target)

            context.setattr(os, "replace", publish_later)
            save_number(folder, 1)
        with Interrupted(monkeypatch, at, lambda published=published: replace(*published.pop())) as dropping:
            checkpoint._drop_replaced(folder)
        steps = dropping.count
        assert saved_number(folder) == (0 if published else 1)
        at += 1
    assert steps > 3


def test_a_save_that_slept_for_hours_between_its_steps_is_whole(tmp_path, monkeypatch):
    def hours_later():
        for file in tmp_path.iterdir():
            os.utime(file, (time.time() - 7200,) * 2)
        save_number(tmp_path, 2)

    for at in range(1, 12):
        save_number(tmp_path, 0)
        with Interrupted(monkeypatch, at, hours_later):
            save_number(tmp_path, 1)
        assert saved_number(tmp_path) in (1, 2)


def test_many_savers_and_a_reader(tmp_path):
    save_number(tmp_path, 0)
    problems, done = [], threading.Event()

    def saver(first):
        try:
            for step in range(20):
                save_number(tmp_path, (first + step) % 3)
        except BaseException as error:
            problems.append(error)

    def reader():
        while not done.is_set():
            try:
                checkpoint._read_weights(tmp_path, checkpoint.read_description(tmp_path, "MoPEFusion", set()))
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=saver, args=(i,)) for i in range(4)]
    watch = threading.Thread(target=reader)
    for thread in (watch, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watch.join()
    assert problems == []
    assert saved_number(tmp_path) in (0, 1, 2)


def test_a_save_that_is_replaced_while_it_is_read(saved, monkeypatch):
    read, others = Path.read_bytes, {}

    def replaced_meanwhile(path):
        before, behind = others.pop(f"before {path.suffix}", None), others.pop(f"behind {path.suffix}", None)
        if before is not None:
            before.save_pretrained(saved)
        data = read(path)
        if behind is not None:
            behind.save_pretrained(saved)
        return data

    def load():
        model = MoPEFusion.from_pretrained(saved, bert(), dinov2())
        assert not others
        return model

    monkeypatch.setattr(Path, "read_bytes", replaced_meanwhile)
    others["behind .json"] = make_model(seed=5, temperature=0.2)
    assert load().config.temperature == 0.2
    others["before .safetensors"] = make_model(seed=6, temperature=0.2)
    assert torch.equal(logits(load()), logits(make_model(seed=6, temperature=0.2)))
    others["before .safetensors"] = make_model()
    with pytest.raises(ValueError, match="was replaced by another model's save while it was read: load it again"):
        load()
    assert torch.equal(logits(load()), logits(make_model()))


def test_a_save_refuses_numbers_that_are_not_finite_by_name_and_keeps_the_old_one(saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model = make_model()
    with torch.no_grad():
        model.head.bias[1:3] = float("nan")
        model.bank.mapper.norm.running_var[0] = float("inf")
    with pytest.raises(ValueError, match=r"(?s)bank.mapper.norm.running_var \(1 of 24\)\n  head.bias \(2 of 5\).*load_pretrained"):
        model.save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_skipped_step_leaves_nothing_behind():
    model = make_model(dropout=0.0, noise_std=0.0).train()
    optimizer, labels = torch.optim.SGD(model.parameter_groups(0.1)), torch.zeros(4, dtype=torch.long)
    scaler = torch.amp.GradScaler("cpu")
    state = {name: value.clone() for name, value in model.trained_state_dict().items()}
    images = make_images(4).float()
    images[0, 0, 0, 0] = float("-inf")
    loss = model(make_text(4), images, labels).loss
    assert loss.isnan()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for name, value in model.trained_state_dict().items():
        assert torch.equal(value, state[name]), name


def test_an_old_save_of_numbers_that_are_not_finite_is_read_with_a_warning(saved):
    rewrite_weights(saved, lambda state: state["head.bias"].fill_(float("inf")))
    with pytest.warns(UserWarning, match=r"not finite, in head.bias \(5 of 5\)"):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


def test_first_saves_of_one_content_are_the_same_to_the_byte(tmp_path, saved):
    make_model().save_pretrained(tmp_path / "other")
    first, second = (
        {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} for folder in (saved, tmp_path / "other")
    )
    assert first == second
