"""Folders of data, saves, feature stores and checkpoints as the world leaves them: with faults, damaged, of something else."""

import copy
import functools
import json
import math
import os
import re
import shutil
import struct
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vlmo_files
from at_the_same_time import in_threads
from judge import REFUSED, RIGHT, Contact, Refusal, WrongError, judge, kept_folder, same
from models import DETERMINISTIC, a_request
from published_sets import make_twitter
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from tiny_fusion import make_bert, make_fusion
from tiny_vlmo import make_config
from torch import nn

from mope_fast import FeatureCache, PromptTuned, VLMo
from mope_fast.data import read_jsonl_folder, read_twitter_sarcasm
from mope_fast.models import checkpoint

READING = (OSError, ValueError)


def run(contact: Contact) -> str:
    use = contact.random.choices((jsonl, published, adapter, store, vlmo, savers), (9, 2, 10, 4, 2, 1))[0]
    contact.note(use.__name__)
    return use(contact)


# folders of JSON lines

NAMES = ("a", "é", "ü 2", "日本", "B", "x.y", "ñandú", "Å", "가", "sub dir")
CLASSES = ("pizza", "crème brûlée", "sushi", "Würfel", "no", "1st")


class Lines:
    """A folder that is to be written, and what reading it should give."""

    def __init__(self, contact: Contact):
        self.contact, self.root = contact, contact.folder / "set"
        self.root.mkdir()
        self.classes = contact.random.sample(CLASSES, contact.random.randint(2, 4))
        self.several = contact.chance(0.25)
        self.splits = {split: [self.row(i) for i in range(contact.random.randint(1, 5))] for split in ("train", "val", "test")}
        self.rows = [row for rows in self.splits.values() for row in rows]
        self.written: dict[str, bytes] = {}
        self.labels = "\n".join(self.classes) + "\n"
        self.settings: dict[str, Any] = {}

    def row(self, number: int) -> dict[str, Any]:
        contact = self.contact
        parts = [contact.choose(NAMES) for _ in range(contact.random.randint(1, 3))]
        color = [contact.random.randint(0, 255) for _ in range(3)]
        path = "/".join([*parts[:-1], f"{parts[-1]}{contact.random.randint(0, 10**6)}.png"])
        on_disk = unicodedata.normalize(contact.choose(("NFC", "NFD")), path)
        # a folder is there in one form
        file = self.root / Path(path).parent / Path(on_disk).name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P6 1 1 255\n" + bytes(color))
        written = unicodedata.normalize(contact.choose(("NFC", "NFD")), path)
        if contact.chance(0.15):
            written = written.replace("/", "\\")
        labels = sorted(contact.random.sample(range(len(self.classes)), contact.random.randint(0, 2))) if self.several else [0]
        label = labels if self.several else contact.random.randrange(len(self.classes))
        named, text = contact.choose((number, f"n{number}")), contact.choose(("a", "ü\n", ""))
        return {"id": named, "text": text, "img": written, "label": label, "color": color}

    def name_of(self, label: Any) -> Any:
        return [self.classes[i] for i in label] if isinstance(label, list) else self.classes[label]

    def write(self) -> None:
        if self.labels is not None:
            (self.root / "labels.txt").write_bytes(self.labels.encode("utf-8", "surrogateescape"))
        for split, rows in self.splits.items():
            lines = []
            for row in rows:
                fields = {"id": row["id"], "text": row["text"], "img": row["img"]}
                if "written" in row:
                    fields["label"] = row["written"]
                elif row["label"] is not None:
                    fields["label"] = self.name_of(row["label"])
                lines.append(
                    row.get("line", json.dumps({**fields, **row.get("fields", {})}, ensure_ascii=self.contact.chance(0.5)))
                )
            end = self.contact.choose(("\n", "\n", "\r\n"))
            text = end.join(lines) + self.contact.choose((end, "", end + end))
            if self.contact.chance(0.2):
                text = "\ufeff" + text
            (self.root / f"{split}.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))

    def expected(self, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        posts = []
        for row in rows:
            label = row["label"]
            if isinstance(label, list):
                label = tuple(int(i in label) for i in range(len(self.classes)))
            posts.append((str(row["id"]), row["text"], label, row["color"]))
        return posts


def jsonl(contact: Contact) -> str:
    lines = Lines(contact)
    for kind in contact.random.sample(HARMLESS, contact.random.randint(0, 2)):
        contact.note("harmless:", kind.__name__)
        kind(contact, lines)
    fault, words = None, None
    if contact.chance(0.5):
        fault = contact.choose(FAULTS)
        words = fault(contact, lines)
        contact.note("fault:", fault.__name__, words)
        if words is None:
            fault = None
    lines.write()

    def use():
        splits = read_jsonl_folder(lines.root, **lines.settings)
        return {split: [(p.id, p.text, p.label, pixel(p)) for p in posts] for split, posts in splits.items()}, splits

    def right(result):
        got, splits = result
        expected = {("val" if split == "dev" else split): lines.expected(rows) for split, rows in lines.splits.items()}
        assert got == expected, f"{got} is not {expected}"
        names = tuple(unicodedata.normalize("NFC", name) for name in lines.classes)
        assert {posts.class_names for posts in splits.values()} == {names}
        for post in (post for posts in splits.values() for post in posts if post.image is not None):
            inside = [Path(folder).resolve() for folder in (lines.root, *lines.settings.get("outside", ()))]
            assert any(post.image.resolve().is_relative_to(folder) for folder in inside), post.image

    return judge(use, None if fault else right, Refusal(READING, words) if fault else None)


def pixel(post) -> list[int]:
    return list(post.open_image().getpixel((0, 0)))


def blank_lines(contact, lines):
    rows = lines.splits[contact.choose(list(lines.splits))]
    rows.insert(
        contact.random.randint(0, len(rows)), {"line": "  ", "id": 0, "text": "", "img": None, "label": None, "blank": True}
    )
    lines.expected = functools.partial(lambda whole, rows: whole([row for row in rows if "blank" not in row]), lines.expected)


def counted_from_0(contact, lines):
    if lines.several or any(re.fullmatch(r"[\d.]+", name) for name in lines.classes):
        return
    for row in lines.rows:
        row["written"] = row["label"]
    lines.rows[0]["label"] = lines.rows[0]["written"] = 0


def to_be_predicted(contact, lines):
    for row in lines.splits.get("test", ()):
        row["label"] = None
        row.pop("written", None)


def no_test(contact, lines):
    lines.rows = [row for row in lines.rows if row not in lines.splits.pop("test", ())]


def dev(contact, lines):
    lines.splits["dev"] = lines.splits.pop("val")


def more_fields(contact, lines):
    for row in lines.rows:
        row["fields"] = {"more": contact.choose(([1, {"a": None}], math.inf, "\ud800", 10**30)), "image": "other"}


def white_space(contact, lines):
    lines.labels = "\n".join(contact.choose((f" {name} ", f"{name}\r", f"\n{name}")) for name in lines.classes)


def other_form_of_classes(contact, lines):
    lines.labels = unicodedata.normalize("NFD", lines.labels)


def a_folder_that_belongs(contact, lines):
    """Images in another folder, behind a link, that is named."""
    other = contact.folder / "other"
    row = contact.choose(lines.rows)
    other.mkdir()
    (other / "1.png").write_bytes(b"P6 1 1 255\n" + bytes(row["color"]))
    (lines.root / "linked").symlink_to(other, target_is_directory=True)
    row["img"] = contact.choose(("linked/1.png", "../other/1.png", str(other / "1.png")))
    lines.settings["outside"] = [other]


HARMLESS = [blank_lines, counted_from_0, to_be_predicted, no_test, dev, more_fields, white_space, other_form_of_classes,
            a_folder_that_belongs]  # fmt: skip


def a_bad_line(contact, lines) -> str:
    """A row to spoil; the name of its file."""
    split = contact.choose(list(lines.splits))
    row = contact.choose([row for row in lines.splits[split] if "blank" not in row])
    contact.bad = row
    return f"{split}.jsonl"


def escapes(contact, lines):
    file = a_bad_line(contact, lines)
    secret = contact.folder / "secret"
    secret.mkdir()
    (secret / "key.png").write_bytes(b"P6 1 1 255\nabc")
    way = contact.choose(("..", "absolute", "file link", "folder link", "link to link", "deep", "backslashes"))
    contact.note(way)
    contact.bad["img"] = {
        "..": "../secret/key.png", "absolute": str(secret / "key.png"), "file link": "link.png", "folder link": "linkdir/key.png",
        "link to link": "two/key.png", "deep": "./a/../../secret/key.png", "backslashes": "..\\secret\\key.png",
    }[way]  # fmt: skip
    (lines.root / "a").mkdir(exist_ok=True)
    (lines.root / "link.png").symlink_to(secret / "key.png")
    (lines.root / "linkdir").symlink_to(secret, target_is_directory=True)
    (lines.root / "two").symlink_to(lines.root / "linkdir", target_is_directory=True)
    if contact.chance(0.5):
        lines.settings["missing_images"] = contact.choose(("grey", "skip"))
    return (file,)


def missing(contact, lines):
    file = a_bad_line(contact, lines)
    contact.bad["img"] = contact.choose(
        (None, "", "gone.png", ".", "nul\0.png", "a" * 300 + ".png", contact.bad["img"].upper() + "x", "x/" * 200)
    )
    if contact.chance(0.3):
        lines.settings["missing_images"] = "grey"
        contact.bad["color"] = [128] * 3
        return None
    return (file,)


def odd_label(contact, lines):
    file = a_bad_line(contact, lines)
    odd = ("piza", True, 10**5000 if contact.chance(0.1) else 10**30, -1, 99, 0.0, math.nan, {"a": 1}, "\ud800")
    value = contact.choose(odd)
    if lines.several:
        value = contact.choose((["piza"], [True], [None], "pizza", [1, 1], [[lines.classes[0]]], [math.nan]))
    elif contact.chance(0.2):
        value = [lines.classes[0]]
        if len(lines.splits[file.removesuffix(".jsonl")]) == 1 or contact.bad is lines.splits[file.removesuffix(".jsonl")][0]:
            return_words = (file, str(lines.root))
            contact.bad["written"] = value
            return return_words
    if isinstance(value, int) and value > 1 << 80:
        contact.bad["line"] = (
            json.dumps({"id": 1, "text": "a", "img": contact.bad["img"]})[:-1]
            + ', "label": 1'
            + "0" * (5000 if value > 10**40 else 30)
            + "}"
        )
    contact.bad["written"] = value if not isinstance(value, int) or value < 1 << 80 else 1
    return (file, str(lines.root))


def half_labelled(contact, lines):
    file = a_bad_line(contact, lines)
    rows = [row for row in lines.splits[file.removesuffix(".jsonl")] if "blank" not in row]
    if len(rows) < 2 or all(row["label"] is None for row in rows):
        return None if contact.bad["label"] is None else odd_label(contact, lines)
    contact.bad["written"] = None
    return (file,)


def no_json(contact, lines):
    file = a_bad_line(contact, lines)
    contact.bad["line"] = contact.choose(
        ('{"id": 1, "text": ', "[1, 2]", "null", "{}", "[" * 100000, '{"a":' * 50000, "'id'", '{"id": 1}', "\x00", "\ufffe{}")
    )
    return (file,)


def odd_field(contact, lines):
    file = a_bad_line(contact, lines)
    odd = {"id": (1.5, None, True, math.nan, "\udfff"), "text": (None, 3, ["a"], "\ud800"), "img": (7, ["a.png"], "\ud800.png")}
    name = contact.choose(list(odd))
    value = contact.choose(odd[name])
    contact.bad["fields"] = {name: value}
    return (file,)


def counted_from_1(contact, lines):
    if lines.several or all(row["label"] is None for row in lines.rows):
        return escapes(contact, lines)
    for row in lines.rows:
        if row["label"] is not None:
            row["written"] = 1 + row["label"] % (len(lines.classes) - 1)
    return (str(lines.root),)


def odd_classes(contact, lines):
    first = lines.classes[0]
    lines.labels = contact.choose(
        (None, "", "\n\n", first, f"{first}\n{first}\n", f"{first}\n{unicodedata.normalize('NFD', first)}\n", "a\nb\udcff\n")
    )
    return ("labels.txt",)


def no_split(contact, lines):
    split = contact.choose([split for split in lines.splits if split in ("train", "val", "dev")])
    if contact.chance(0.5):
        del lines.splits[split]
    else:
        lines.splits[split] = []
    return ("train.jsonl",) if split == "train" else ("val.jsonl", "dev.jsonl")


def other_case(contact, lines):
    """On a disk where case counts."""
    file = a_bad_line(contact, lines)
    other = contact.bad["img"].removesuffix(".png") + ".PNG"
    if (lines.root / other.replace("\\", "/")).exists():
        return None
    contact.bad["img"] = other
    return (file,)


FAULTS = [
    escapes,
    escapes,
    missing,
    odd_label,
    half_labelled,
    no_json,
    odd_field,
    counted_from_1,
    odd_classes,
    no_split,
    other_case,
]


# published sets


def published(contact: Contact) -> str:
    """The tweets of the sarcasm set, with one fault or none."""
    fault = contact.choose(
        (None, "twice", "label", "id", "image gone", "image outside", "bytes", "half a pair", "no list", "long", "cut")
    )
    end = contact.choose(("\n", "\r\n"))
    ids = [str(number) for number in contact.random.sample(range(1, 10**9), contact.random.randint(1, 4))]
    texts = [contact.choose(("good .", 'it \'s "great"', "é …", "")) for _ in ids]
    labels = [contact.random.randint(0, 1) for _ in ids]
    rows: list[Any] = [list(row) for row in zip(ids, texts, labels, strict=True)]
    make_twitter(contact.folder, {"train.txt": rows}, end)
    bad, picture = contact.choose(rows), contact.folder / "dataset_image" / f"{contact.choose(ids)}.jpg"
    if fault == "twice":
        rows.append(bad)
    elif fault == "label":
        bad[2] = contact.choose((2, -1, True, None, "1", 1.0, [1]))
    elif fault == "id":
        bad[0] = contact.choose(("../1", "1/2", "", "x", 7, "٣", "1\n", "-1", "1\0"))
    elif fault == "image gone":
        picture.unlink()
    elif fault == "image outside":
        picture.rename(contact.folder.parent / f"{contact.folder.name}-secret.jpg")
        picture.symlink_to(contact.folder.parent / f"{contact.folder.name}-secret.jpg")
    lines = [repr(row) for row in rows]
    damaged = {
        "bytes": "['1', '\udce9', 1]",
        "half a pair": "['1', '\\ud800', 1]",
        "no list": contact.choose(("{}", "['1'", "os.remove('a')", "[" * 9999)),
        "long": f"['1', '{'a' * 20000}', 1]",
        "cut": lines[-1][: contact.random.randint(1, len(lines[-1]) - 1)],
    }
    if fault in damaged:
        lines[-1] = damaged[fault]
    text = contact.choose(("", "\ufeff")) + end.join(lines) + contact.choose((end, "", end * 3))
    (contact.folder / "text" / "train.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    contact.note(fault, lines)

    def right(posts):
        assert [(post.id, post.text, post.label) for post in posts] == list(zip(ids, texts, labels, strict=True))
        assert all(post.image.is_file() and post.image.stem == post.id for post in posts)

    use = functools.partial(read_twitter_sarcasm, contact.folder, "train")
    return judge(use, None if fault else right, Refusal(READING, ("train.txt, line ",)) if fault else None)


# saves

ODD = (None, True, 0, -1, 1.5, 10**30, "a", "", [], [1], {}, {"a": {"b": 1}}, "0.1", math.nan, 10**400)


@functools.cache
def saves() -> dict[str, tuple[Path, Any, dict[str, torch.Tensor], Any, torch.Tensor]]:
    """Of each kind a folder, a model, what is trained in it, a request, and what it gives."""
    torch.manual_seed(20)
    made = {
        "fused": make_fusion(make_bert(), None, **DETERMINISTIC),
        "other size": make_fusion(make_bert(), None, **{**DETERMINISTIC, "num_experts": 3}),
        "tuned": PromptTuned(make_bert(), 3, 5).double().eval(),
    }
    found = {}
    for name, model in made.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter)).copy_(parameter.float())
        folder = kept_folder()
        model.save_pretrained(folder)
        request = a_request("tuned" if name == "tuned" else "text", 2)
        trained = {key: value.clone() for key, value in model.trained_state_dict().items()}
        found[name] = folder, model, trained, request, model(*request).logits.detach()
    return found


def adapter(contact: Contact) -> str:
    kind = contact.choose(("fused", "fused", "tuned"))
    saved, model, trained, request, logits = saves()[kind]
    folder = contact.folder / "save"
    shutil.copytree(saved, folder)
    damage, strict, in_place = contact.choose(DAMAGES), contact.chance(0.3), contact.chance(0.5)
    contact.note(kind, damage.__name__)
    free = damage(contact, folder) or {}  # what may differ where it is taken
    if not in_place and free.get("fits"):  # a model is made as the save says
        free = {"trained": saves()[free["fits"]][2]}
    twin = copy.deepcopy(model)
    before = {key: value.clone() for key, value in twin.trained_state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    halved = {key: value.clone() for key, value in twin.trained_state_dict().items()}
    contact.note(f"{strict=} {in_place=} {free}")
    if in_place:

        def use():
            twin.load_pretrained(folder, strict=strict)
            return twin

    else:
        encoder = twin.unwrap()
        encoder = encoder[0] if isinstance(encoder, tuple) else encoder

        def use():
            return type(model).from_pretrained(folder, encoder, strict=strict).double()

    def right(loaded):
        expected = free.get("trained", trained)
        same(
            loaded.trained_state_dict(),
            {key: value.double() if value.is_floating_point() else value for key, value in expected.items()},
            free.get("tolerance", 0),
        )
        if not free:
            same(loaded(*request).logits, logits)
        if not in_place:
            loaded.unwrap()

    verdict = judge(
        use,
        None if free.get("refuse") else right,
        None if damage is whole else Refusal((FileNotFoundError, NotADirectoryError, ValueError), (str(folder),)),
    )
    if verdict == REFUSED:
        if in_place:
            same(twin.trained_state_dict(), halved, 0)
            twin.load_pretrained(saved, strict=True)
        else:  # the encoder is free
            twin = type(model).from_pretrained(saved, encoder, strict=True).double()
        same(twin.trained_state_dict(), before, 0)
        same(twin(*request).logits, logits)
    return verdict


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mope_fast.json").read_text())


def describe(folder: Path, description: Any) -> None:
    (folder / "mope_fast.json").write_text(json.dumps(description))


def whole(contact, folder):
    if contact.chance(0.5):
        (folder / "README.md").write_text("a")
        (folder / "mope_fast-0123.safetensors").write_bytes(b"older")


def bytes_flipped(contact, folder):
    file = contact.choose(list(folder.iterdir()))
    content = bytearray(file.read_bytes())
    for _ in range(contact.choose((1, 1, 5))):
        content[contact.random.randrange(len(content))] ^= 1 << contact.random.randrange(8)
    file.write_bytes(content)
    contact.note(file.suffix)
    # a digit of a number that somebody may as well have written there
    return {"description": True} if file.suffix == ".json" else {"refuse": True}


def file_cut(contact, folder):
    file = contact.choose(list(folder.iterdir()))
    content = file.read_bytes()
    file.write_bytes(content[: contact.random.randrange(len(content))])
    return {"refuse": True}


def file_gone(contact, folder):
    contact.choose(list(folder.iterdir())).unlink()
    return {"refuse": True}


def folder_gone(contact, folder):
    shutil.rmtree(folder)
    if contact.chance(0.5):
        folder.write_text("a file")
    return {"refuse": True}


def value_edited(contact, folder):
    description = described(folder)
    at, keys = description, []
    while isinstance(at, dict) and at and (not keys or contact.chance(0.7)):
        keys.append(contact.choose(list(at)))
        parent, at = at, at[keys[-1]]
    how = contact.choose(("value", "value", "gone", "more"))
    value = contact.choose(ODD)
    contact.note(how, keys, value)
    if how == "value":
        parent[keys[-1]] = value
    elif how == "gone":
        del parent[keys[-1]]
    else:
        parent["more"] = value
    describe(folder, description)
    return {"description": True}


def no_description(contact, folder):
    text = contact.choose(
        (
            "",
            "[]",
            "null",
            "3",
            '"a"',
            "[" * 100000,
            '{"format": 2}',
            "NaN",
            "\ufeff{}",
            "\x00" * 50,
            '{"format": 1}',
            '{"format": 99}',
        )
    )
    (folder / "mope_fast.json").write_text(text)
    return {"refuse": True}


def names_another_file(contact, folder):
    description, weights = described(folder), weights_of(folder)
    name = contact.choose(
        ("../other.safetensors", "/etc/passwd", "", ".", "..", "mope_fast.json", "a\0b", "a" * 400, f"./{weights.name}")
    )
    shutil.copy(weights, folder.parent / "other.safetensors")
    describe(folder, {**description, "weights": name})
    return {"refuse": True}


def another_models(contact, folder):
    kind = "fused" if described(folder)["model"] == "PromptTuned" else contact.choose(("tuned", "other size"))
    shutil.rmtree(folder)
    shutil.copytree(saves()[kind][0], folder)
    return {"refuse": True, "fits": "other size" if kind == "other size" else None}


def renamed_weights(contact, folder):
    """Another content under a name that fits it, as a program would write it that edits saves."""
    weights, description = weights_of(folder), described(folder)
    state = deserialize(weights.read_bytes())
    name = contact.choose(list(state))
    how = contact.choose(("dtype", "shape", "gone", "more", "nan", "numbers", "no tensors"))
    free: dict[str, Any] = {"refuse": True}
    if how == "dtype":
        dtype = contact.choose((torch.float32, torch.bfloat16, torch.float16))
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        free = {"trained": state, "tolerance": 1e-12}
    elif how == "shape":
        state[name] = state[name][None].clone()
    elif how == "gone":
        del state[name]
    elif how == "more":
        state["more"] = torch.ones(2)
    elif how == "nan":
        name = contact.choose([key for key, value in state.items() if value.is_floating_point()])
        state[name] = torch.full_like(state[name], math.nan)
        free = {"trained": state}
    elif how == "numbers":
        state = {key: value * 2 for key, value in state.items()}
        free = {"trained": state}
    else:
        state = {}
    contact.note(how)
    data = serialize(state)
    weights.unlink()
    description["weights"] = f"{checkpoint._content_name(data)}.safetensors"
    (folder / description["weights"]).write_bytes(data)
    describe(folder, description)
    return free


DAMAGES = [
    whole, file_cut, file_gone, folder_gone, no_description, names_another_file, another_models, *[bytes_flipped] * 2,
    *[value_edited] * 4, *[renamed_weights] * 2,
]  # fmt: skip


# feature stores


def an_encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 4)


def store(contact: Contact) -> str:
    folder, encoder = contact.folder / "features", an_encoder()
    inputs = torch.randn(6, 3)
    features = encoder(inputs).detach()
    for begin in (0, 2, 4):
        with FeatureCache(folder, encoder) as cache:
            cache(inputs[begin : begin + 2])
    files = sorted(folder.iterdir())
    damage = contact.choose(
        ("flipped", "flipped", "cut", "gone", "empty", "copied", "meta", "old", "other encoder", "stray", "swapped")
    )
    file, refusal = contact.choose(files), Refusal((ValueError,), (str(folder),))
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        for _ in range(contact.choose((1, 1, 4))):
            content[contact.random.randrange(len(content))] ^= 1 << contact.random.randrange(8)
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: contact.random.randrange(file.stat().st_size)])
    elif damage == "gone":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "copied":
        segment = next(f for f in files if f.suffix == ".safetensors")
        shutil.copy(segment, segment.with_name("features.2-0123456789abcdef.safetensors"))
    elif damage == "meta":
        meta = next(folder.glob("meta*"))
        described_as = json.loads(meta.read_text())
        key = contact.choose([*described_as, "more"])
        described_as[key] = contact.choose(ODD)
        meta.write_text(json.dumps(described_as))
        contact.note(key, described_as[key])
    elif damage == "old":
        (folder / "meta.json").write_text("{}")
        (folder / "features-0123.safetensors").write_bytes(serialize({"features": torch.zeros(6, 4)}))
    elif damage == "other encoder":
        encoder = an_encoder(1)
        features = encoder(inputs).detach()
    elif damage == "stray":
        (folder / contact.choose((".DS_Store", "features.2-x.safetensors.tmp", "notes.txt"))).write_bytes(b"a")
    else:
        segments = [f for f in files if f.suffix == ".safetensors"]
        a, b = segments[0].read_bytes(), segments[1].read_bytes()
        segments[0].write_bytes(b), segments[1].write_bytes(a)
    contact.note(damage, file.name)
    order = torch.randperm(6)

    def use():
        return FeatureCache(folder, encoder)(inputs[order])

    right = functools.partial(same, expected=features[order], tolerance=1e-6)
    must = damage == "other encoder"
    verdict = judge(use, None if must else right, refusal if damage not in ("copied", "old", "stray", "gone", "swapped") else None)
    for _ in range(6):  # what the message says: this one file is to be deleted
        if must or verdict == RIGHT:
            break
        try:
            right(use())
            break
        except ValueError as error:
            named = re.search(re.escape(str(folder)) + r"/[\w.-]+", str(error))
            if named is None or "delete this one file" not in str(error):
                if not any(words in str(error) for words in ("of another encoder", "use another folder")):
                    raise WrongError(f"it says neither which file to delete nor what else to do: {error}") from error
                break
            os.unlink(named[0])
    else:
        raise WrongError("deleting the files that it names doesn't help")
    return verdict


# VLMo's files


@functools.cache
def vlmo_file() -> tuple[dict[str, torch.Tensor], Any, bytes, bytes]:
    config = make_config("base", hidden_size=12, num_heads=2, num_layers=2, first_fusion_layer=1, mlp_ratio=1)
    torch.manual_seed(21)
    state = vlmo_files.random_state(vlmo_files.tiny_shapes(config))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": state}, f"{folder}/a.pt")
        return state, config, Path(f"{folder}/a.pt").read_bytes(), serialize(state)


def vlmo(contact: Contact) -> str:
    state, config, pickled, tensors = vlmo_file()
    suffix = contact.choose((".pt", ".safetensors"))
    content = bytearray(pickled if suffix == ".pt" else tensors)
    damage = contact.choose((None, "cut", "flipped", "flipped", "empty", "html", "other ending"))
    if damage == "cut":
        content = content[: contact.random.randrange(len(content))]
    elif damage == "flipped":
        for _ in range(contact.choose((1, 1, 8))):
            place = contact.choose((len(content), 2000, 64))
            content[-contact.random.randrange(1, place) if contact.chance(0.5) else contact.random.randrange(place)] ^= (
                1 << contact.random.randrange(8)
            )
    elif damage == "empty":
        content = b""
    elif damage == "html":
        content = b"<!DOCTYPE html><html>Not found</html>"
    path = contact.folder / f"vlmo{suffix if damage != 'other ending' else contact.choose(('.bin', '.ckpt', ''))}"
    path.write_bytes(content)
    contact.note(suffix, damage, path.name)

    def right(model):
        expected = state if suffix == ".pt" else tensors_by_hand(bytes(content))
        for key, value in model.state_dict().items():
            same(value, expected[key], 0)

    refusal = (
        None
        if damage is None or (damage, suffix) == ("other ending", ".pt")
        else Refusal((ValueError, FileNotFoundError), (str(path),))
    )
    return judge(lambda: VLMo.from_checkpoint(path, config=config), None if damage in ("empty", "html") else right, refusal)


def tensors_by_hand(content: bytes) -> dict[str, torch.Tensor]:
    """The format of safetensors: the length of a JSON header, the header, numbers."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return {
        key: torch.from_numpy(np.frombuffer(data[slice(*entry["data_offsets"])], np.float32).copy()).reshape(entry["shape"])
        for key, entry in header.items()
        if key != "__metadata__"
    }


# savers of one folder


def savers(contact: Contact) -> str:
    """Threads that save into one folder while others read it."""
    model, folder = saves()["fused"][1], contact.folder / "save"
    twins = [copy.deepcopy(model) for _ in range(contact.random.randint(2, 3))]
    reader = copy.deepcopy(model)
    for number, twin in enumerate(twins):
        with torch.no_grad():
            twin.head.bias.fill_(number + 1)
    twins[0].save_pretrained(folder)
    known = [twin.head.bias.detach().clone() for twin in twins]

    def read():
        for _ in range(3):
            reader.load_pretrained(folder, strict=True)
            assert any(torch.equal(reader.head.bias, bias) for bias in known), reader.head.bias

    uses: list[Callable[[], Any]] = [functools.partial(twin.save_pretrained, folder) for twin in twins for _ in range(2)]
    for result in in_threads(*uses, read):
        if isinstance(result, BaseException):
            raise WrongError(repr(result)) from result
    read()
    twins[-1].save_pretrained(folder)
    reader.load_pretrained(folder, strict=True)
    assert torch.equal(reader.head.bias, known[-1])
    assert len(list(folder.glob("*.safetensors"))) == 1
    return RIGHT
