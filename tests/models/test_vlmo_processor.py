"""Text and images on their way into VLMo."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlmo import make_vlmo
from transformers import BertTokenizer

from mope_fast import VLMoProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "on", "grass", "##s"]
SIDE = 12


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("bert") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return VLMoProcessor(BertTokenizer(str(vocabulary)), image_size=SIDE)


def make_array(height=40, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image):
    white = Image.new("RGBA", image.size, "white")
    shown = Image.alpha_composite(white, image.convert("RGBA")) if image.mode in ("LA", "RGBA") else image
    resized = shown.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (torch.tensor(np.asarray(resized)).permute(2, 0, 1).double() / 255 - 0.5) / 0.5


def test_tokens_are_padded_and_cut_to_forty(processor):
    inputs = processor(["a dogs on Grass", "cat", "a dog " * 30])
    assert set(inputs) == {"input_ids", "attention_mask"}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == mask.shape == (3, 40)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[0].tolist() == [2, 5, 6, 9, 7, 8, 3] + [0] * 33
    assert ids[1].tolist() == [2, 1, 3] + [0] * 37
    assert ids[2].tolist() == [2, *[5, 6] * 19, 3]
    assert torch.equal(mask, (ids != 0).long())
    assert torch.equal(processor("cat")["input_ids"], ids[1:2])
    assert torch.equal(processor(text for text in ("cat", "cat"))["input_ids"], ids[[1, 1]])


def test_other_lengths_fit_the_model(processor):
    short = VLMoProcessor(processor.tokenizer, image_size=SIDE, max_text_length=5)
    inputs = short(["a dog on grass", "a"], [Image.fromarray(make_array())] * 2)
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]]
    output = make_vlmo("base", max_text_length=5).float()(**inputs)
    assert output.text.shape == (2, 5, 24)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize(("height", "width"), [(40, 50), (12, 12), (5, 7), (90, 3), (1, 1)])
def test_images_of_every_mode_and_size_are_resized_as_by_pillow(processor, mode, height, width):
    image = Image.fromarray(make_array(height, width)).convert(mode)
    inputs = processor(images=image)
    assert set(inputs) == {"pixel_values"}
    assert inputs["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(inputs["pixel_values"][0].double(), by_pillow(image), rtol=0, atol=1e-6)


def test_a_picture_is_what_a_viewer_shows(processor, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    left_white = np.zeros((SIDE, SIDE), np.uint16)
    left_white[:, : SIDE // 2] = 65535
    Image.fromarray(left_white).save(tmp_path / "deep.png", exif=exif)
    with Image.open(tmp_path / "deep.png") as image:
        values = processor(images=image)["pixel_values"]
    top_white = (left_white.T.astype(np.float32) / 65535 - 0.5) / 0.5
    assert np.array_equal(values.numpy(), np.broadcast_to(top_white, (1, 3, SIDE, SIDE)))
    assert processor(images=Image.new("RGBA", (5, 5)))["pixel_values"].unique().tolist() == [1.0]


def test_white_is_one_and_black_is_minus_one(processor):
    white, black = processor(images=[Image.new("RGB", (9, 5), colour) for colour in ("white", "black")])["pixel_values"]
    assert white.unique().tolist() == [1.0]
    assert black.unique().tolist() == [-1.0]


def test_arrays_and_tensors_are_images_too(processor):
    arrays = [make_array(seed=seed) for seed in range(2)]
    expected = torch.stack([by_pillow(Image.fromarray(array)) for array in arrays]).float()
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in arrays]
    many = [arrays, tensors, tuple(tensors), np.stack(arrays), torch.stack(tensors), [array.transpose(2, 0, 1) for array in arrays]]
    for images in (*many, [Image.fromarray(arrays[0]), tensors[1]], (array for array in arrays)):
        torch.testing.assert_close(processor(images=images)["pixel_values"], expected)
    for image in (arrays[0], tensors[0], Image.fromarray(arrays[0])):
        torch.testing.assert_close(processor("a", image)["pixel_values"], expected[:1])


ARRAY = make_array()


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "neither text nor images"),
        ({"text": []}, ValueError, "no text: expected at least one"),
        ({"images": []}, ValueError, "no image: expected at least one"),
        ({"text": ["a", "a"], "images": ARRAY}, ValueError, "got 2 texts and 1 images: expected one image per text"),
        ({"text": ["a", None]}, TypeError, "text must be a str or a sequence of str, got NoneType"),
        ({"text": [["a", "dog"]]}, TypeError, "got list"),
        ({"text": 3}, TypeError, "got int"),
        ({"images": ["cat.png"]}, TypeError, r"got str: use PIL\.Image\.open"),
        ({"images": "cat.png"}, TypeError, "got str: use"),
        ({"images": 3}, TypeError, "images must be PIL images, arrays or tensors, got int"),
        ({"images": [[ARRAY]]}, TypeError, "got list"),
        ({"images": ARRAY / 255}, TypeError, "must be uint8, 0 to 255, got float64"),
        ({"images": torch.rand(3, 9, 9)}, TypeError, r"must be uint8, 0 to 255, got torch\.float32"),
        ({"images": [ARRAY.astype(np.int64)]}, TypeError, "got int64"),
        ({"images": ARRAY.astype(np.uint16)}, TypeError, "must be uint8, 0 to 255, got uint16"),
        ({"images": make_array(3, 9)}, ValueError, r"shape \(3, 9, 3\) could have its channels first or last: pass a PIL image"),
        ({"images": Image.new("F", (3, 2))}, OSError, "mode F of an image in memory has no known value range"),
        ({"images": ARRAY[..., 0]}, ValueError, r"must be \(3, H, W\) or \(H, W, 3\), got \(40, 50\)"),
        ({"images": torch.zeros(4, 9, 9, dtype=torch.uint8)}, ValueError, r"got \(4, 9, 9\)"),
        ({"images": torch.zeros(3, 0, 9, dtype=torch.uint8)}, ValueError, r"got \(3, 0, 9\)"),
    ],
)
def test_wrong_inputs(processor, inputs, error, message):
    with pytest.raises(error, match=message):
        processor(**inputs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokenizer": "bert-base-uncased"}, TypeError, "tokenizer must be a transformers tokenizer, got str"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        ({"image_size": (3, 3)}, TypeError, r"image_size must be an integer, got \(3, 3\)"),
        ({"max_text_length": 2}, ValueError, "max_text_length must be at least 3, got 2"),
    ],
)
def test_wrong_settings(processor, settings, error, message):
    with pytest.raises(error, match=message):
        VLMoProcessor(**{"tokenizer": processor.tokenizer, **settings})


def test_a_processor_of_a_model_fits_it(processor):
    vlmo = make_vlmo()
    inputs = VLMoProcessor.of(vlmo, processor.tokenizer)("a dog " * 30, Image.new("RGB", (50, 20)))
    side = vlmo.config.image_size
    assert inputs["input_ids"].shape == (1, vlmo.config.max_text_length)
    assert inputs["pixel_values"].shape == (1, 3, side, side)
