"""The page is one bounded file that needs nothing else, and shows what was recorded."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mope_fast.analysis import Recorder, pictures
from mope_fast.analysis import report as page
from mope_fast.data import Post

NASTY = "</script><script>document.title='injected'</script><img src=x onerror=\"document.title='injected'\">"


def recorded(layers=2, samples=6, experts=3, classes=2, steps=1, **settings):
    recorder = Recorder(class_names=[f"class {c}" for c in range(classes)] if classes else None, **settings)
    for _ in range(steps):
        scores = (torch.randn(layers, samples, experts) * 3).softmax(-1)
        recorder.update(scores, torch.randint(classes, (samples,)) if classes else None)
    return recorder


def data_of(file):
    text = file.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def pixels(uri):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.format.lower() == kind
    return image


def test_numbers_on_the_page_are_those_recorded(tmp_path):
    recorder = recorded(steps=5)
    data = data_of(recorder.report(tmp_path / "new" / "report.html"))
    assert (data["layers"], data["experts"]) == (2, 3)
    for name in ("entropy", "balance", "information"):
        torch.testing.assert_close(torch.tensor(data[name]).double(), getattr(recorder, name), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(data["classInformation"]).double(), recorder.class_information, rtol=0, atol=1e-6)
    importance = torch.tensor(data["importance"]) * data["unit"]
    torch.testing.assert_close(importance.double(), recorder.importance, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        (torch.tensor(data["classes"]["scores"]) * data["unit"]).double(), recorder.by_class, rtol=0, atol=1e-5
    )
    assert data["classes"]["counts"] == recorder.class_counts.tolist()
    curves = (torch.tensor(data["curves"]["importance"]) * data["unit"]).transpose(0, 1)
    torch.testing.assert_close(curves.double(), recorder.curves.importance, rtol=0, atol=1e-5)
    assert data["curves"]["edges"] == [0, 1, 2, 3, 4, 5]
    for layer in range(2):
        for expert in range(3):
            shown = [(data["samples"][index][0], score) for index, score in data["top"][layer][expert]]
            assert shown == [(sample.id, round(sample.score, 6)) for sample in recorder.top_samples(layer, expert)]


def test_one_file_that_loads_nothing_and_whose_texts_are_texts(tmp_path):
    recorder = Recorder(class_names=["<b>bold</b>", "{{script}}"])
    recorder.update(torch.eye(2)[None], labels=[0, 1])
    file = recorder.report(tmp_path / "report.html", samples=lambda i: NASTY, title="<i>{{data}}</i>")
    text = file.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "</script><script>document" not in text
    assert text.count("<script") == 2
    assert "<title>&lt;i&gt;{{data}}&lt;/i&gt;</title>" in text
    data = data_of(file)
    assert data["samples"][0][1] == NASTY
    assert data["classes"]["names"] == ["<b>bold</b>", "{{script}}"]
    addresses = set(re.findall(r"https?://[^\"' ]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace; nothing is loaded from there
    assert not re.findall(r"<(?:link|iframe|object|embed)|@import|url\(|fetch\(|XMLHttpRequest|eval\(", text)
    assert "default-src 'none'" in text


def test_alarms_come_first_and_in_plain_words(tmp_path):
    recorder = Recorder()
    recorder.update(torch.tensor([[[0.99, 0.01], [0.98, 0.02]]]).repeat(9, 1, 1))
    text = recorder.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>9 alarms</h2>" in text
    assert "layer 0: expert 0 takes 98.5% of all scores" in text
    assert "<summary>4 more</summary>" in text
    assert "Try a larger importance_weight" in text
    assert text.index("9 alarms") < text.index("Entropy per layer")
    assert "No alarms" in recorded().report(tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 1), (48, 4, 256, 1000, 40)])
def test_from_the_smallest_to_the_largest_a_page_is_bounded_and_says_what_it_leaves_out(tmp_path, sizes):
    layers, samples, experts, classes, steps = sizes
    recorder = recorded(layers, samples, experts, classes, steps)
    file = recorder.report(tmp_path / "report.html", samples=lambda i: "word " * 1000)
    assert file.stat().st_size < 12e6
    data, text = data_of(file), file.read_text(encoding="utf-8")
    assert len(data["samples"]) <= page.MAX_SAMPLES
    assert all(len(sample[1]) <= pictures.LENGTH for sample in data["samples"])
    if classes:
        assert len(data["classes"]["names"]) == page.MAX_CLASSES
        assert "The table of classes has 60 of" in text
        assert "classes have no sample" in text
        assert "points instead of the 40 recorded" in text
        assert sum(map(len, data["curves"]["importance"])) * experts <= page.MAX_CURVE
    else:
        assert data["classes"] is data["curves"] is None


def test_places_of_samples_left_out_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_SAMPLES", 4)
    recorder = recorded(samples=30, experts=4, top=2)
    data = data_of(file := recorder.report(tmp_path / "report.html", samples=str))
    assert len(data["samples"]) == 4
    entries = sum(len(best) for layer in data["top"] for best in layer)
    assert f"4 samples are shown; {2 * 4 * 2 - entries} entries" in file.read_text(encoding="utf-8")
    # the most used expert is served first
    layer, expert = divmod(int(recorder.importance.argmax()), 4)
    assert data["samples"][0][0] == recorder.top_samples(layer, expert)[0].id


def test_curves_of_training_beside_measures_of_evaluation(tmp_path):
    evaluation, training = recorded(steps=2), recorded(steps=7)
    data = data_of(evaluation.report(tmp_path / "report.html", training=training))
    assert data["curves"]["edges"][-1] == 7
    torch.testing.assert_close(torch.tensor(data["entropy"]).double(), evaluation.entropy, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"training was recorded with \(2, 5\) layers and experts, this with \(2, 3\)"):
        evaluation.report(tmp_path / "report.html", training=recorded(experts=5))


def test_samples_are_shown_whatever_kind_they_are(tmp_path):
    red = Image.new("RGB", (640, 320), "red")
    red.save(tmp_path / "red.png")
    tensor = torch.zeros(3, 8, 8, dtype=torch.uint8)
    tensor[0] = 255
    normalised = torch.stack([torch.full((4, 4), 3.0), torch.full((4, 4), -1.0), torch.full((4, 4), -1.0)])
    samples = [
        "text alone", red, ("both", tmp_path / "red.png"), {"image": tensor, "text": "dict"}, ("path", str(tmp_path / "red.png")),
        (tensor / 255, "picture first"), (None, normalised), ("label behind", tensor, 3), (tensor > 0, 5), ("only a label", 3),
        Post("10", "post", tmp_path / "red.png", 0),
    ]  # fmt: skip
    recorder = Recorder(top=len(samples))
    recorder.update(torch.rand(1, len(samples), 2))
    data = data_of(recorder.report(tmp_path / "report.html", samples=samples))
    shown = {sample[0]: sample[1:] for sample in data["samples"]}
    texts = ["text alone", None, "both", "dict", "path", "picture first", None, "label behind", None, "only a label", "post"]
    assert [shown[i][0] for i in range(11)] == texts
    assert shown[0][1] is None
    assert shown[9][1] is None
    for i in {*range(1, 11)} - {9}:
        picture = pixels(shown[i][1])
        assert max(picture.size) <= pictures.SIDE
        red, green, blue = picture.convert("RGB").getpixel((1, 1))
        assert red > 250
        assert max(green, blue) < 5
    assert pixels(shown[1][1]).size == (112, 56)


def test_a_path_in_the_place_of_an_image_is_no_text(tmp_path):
    Image.new("RGB", (4, 4), "red").save(path := tmp_path / "red.png")
    for sample in ({"image": str(path)}, {"text": None, "image": str(path)}, Post("1", None, str(path), 0)):
        text, picture = pictures.show(sample, "sample 1")
        assert text is None
        assert picture.startswith("data:image/png")


def test_a_picture_is_what_a_viewer_shows(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.full((4, 8), 128 * 257, np.uint16)).save(tmp_path / "grey.png", exif=exif)
    recorder = Recorder(top=2)
    recorder.update(torch.rand(1, 2, 2))
    samples = [("turned grey", tmp_path / "grey.png"), ("white", Image.new("LA", (4, 8), 0))]
    data = data_of(recorder.report(tmp_path / "report.html", samples=samples))
    for _, text, uri in data["samples"]:
        assert pixels(uri).size == (4, 8)
        assert pixels(uri).convert("RGB").getcolors() == [(32, (255 if text == "white" else 128,) * 3)]


def test_lone_surrogates_do_not_cost_the_report(tmp_path):
    recorder = Recorder(class_names=["caf\udce9", "tea"])
    recorder.update(torch.rand(1, 2, 2), labels=[0, 1])
    assert "caf?" in recorder.report(tmp_path / "report.html", samples=["a \ud800 b", "c"], title="\udce9").read_text()
    recorder.save(tmp_path / "routing.safetensors")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("text",)], "samples has no id 1: its ids must be those given to note"),
        ({0: "text"}, "samples has no id 1"),
        ([3, 4], "sample [01]: expected a text, a PIL image, a path of one, or a tensor .* got [34]"),
        ([torch.zeros(4, 4)] * 2, r"sample [01]: .* got torch.float32 \(4, 4\) \(the shape is not \(3, H, W\)\)"),
        ([torch.full((3, 4, 4), float("nan"))] * 2, r"sample [01]: .* \(it has NaN or infinite values\)"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint16)] * 2, r"got torch.uint16 .*among integer dtypes only uint8 has a known range"),
        ([Image.new("F", (4, 4))] * 2, r"sample [01]: .*mode F of an image in memory has no known value range"),
        ([{"label": 1}] * 2, r"sample [01]: a dict must have 'text' or 'image', got \['label'\]"),
        ([("text", "missing.png")] * 2, "sample [01]: .* got 'missing.png'"),
    ],
)
def test_samples_that_can_not_be_shown_are_named_and_no_page_is_written(tmp_path, samples, message):
    recorder = recorded(samples=2)
    with pytest.raises(ValueError, match=message):
        recorder.report(tmp_path / "report.html", samples=samples)
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_texts_needs_no_pillow(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    recorder = recorded(samples=2)
    recorder.report(tmp_path / "report.html", samples=["a", "b"])
    with pytest.raises(ImportError, match="pictures need Pillow: pip install pillow"):
        recorder.report(tmp_path / "report.html", samples=[torch.zeros(3, 4, 4)] * 2)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file in it"):
        recorded().report(tmp_path)
