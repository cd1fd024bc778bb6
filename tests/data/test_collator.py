"""FusionCollator: samples in, a fusion's keyword arguments out."""

import functools
import pickle

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as vision
from transformers import BertTokenizerFast, ViTImageProcessor, WhisperFeatureExtractor

from mope_fast import FusionCollator
from mope_fast.data import EachFrame, Post, Posts, StackEach, TimmTransform

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "is", "it", "?"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=6)


@pytest.fixture
def posts(tmp_path):
    for i in range(3):
        Image.new("RGB", (10 + i, 8), (50 * i, 0, 255)).save(tmp_path / f"{i}.png")
    texts = ["is it red ?", "circle", "is it it it it it it it ?"]
    return Posts(tuple(Post(str(i), texts[i], tmp_path / f"{i}.png", i % 2) for i in range(3)), ("no", "yes"))


def pixels(image):
    return vision.to_tensor(image.resize((4, 4)))


PROCESSOR = ViTImageProcessor(size={"height": 6, "width": 6})


def test_a_tokenizer_pads_and_truncates_and_a_processor_takes_the_images(posts, tokenizer):
    batch = FusionCollator(tokenizer, PROCESSOR)(posts)
    assert list(batch) == ["main_inputs", "complementary_inputs", "labels"]
    assert type(batch["main_inputs"]) is dict
    assert batch["main_inputs"]["input_ids"].shape == (3, 6)
    assert batch["main_inputs"]["attention_mask"].sum(1).tolist() == [6, 3, 6]
    images = batch["complementary_inputs"]["pixel_values"]
    expected = PROCESSOR([post.open_image() for post in posts], return_tensors="pt")["pixel_values"]
    assert torch.equal(images, expected)
    assert torch.equal(batch["labels"], torch.tensor([0, 1, 0]))


def test_the_image_can_be_the_main_side(posts, tokenizer):
    collate = FusionCollator(
        StackEach(pixels), functools.partial(tokenizer, padding="max_length", max_length=5, truncation=True, return_tensors="pt"),
        main_field="image", complementary_field="text",
    )  # fmt: skip
    batch = collate(posts)
    assert torch.equal(batch["main_inputs"], torch.stack([pixels(post.open_image()) for post in posts]))
    assert batch["complementary_inputs"]["input_ids"].shape == (3, 5)


def test_one_side_makes_a_batch_of_a_model_of_one_encoder(posts, tokenizer):
    batch = FusionCollator(tokenizer, None, complementary_field=None)(posts)
    assert list(batch) == ["inputs", "labels"]
    assert batch["inputs"]["input_ids"].shape == (3, 6)
    images = FusionCollator(PROCESSOR, None, main_field="image", complementary_field=None)
    assert images(posts)["inputs"]["pixel_values"].shape == (3, 3, 6, 6)
    with pytest.raises(ValueError, match="complementary_field=None is for one side: leave complementary at None"):
        FusionCollator(tokenizer, PROCESSOR, complementary_field=None)


def test_timms_own_transform_of_an_encoder(posts):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    config = {**timm.data.resolve_model_data_config(vit), "input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config)
    expected = torch.stack([transform(post.open_image()) for post in posts])
    made = TimmTransform.of(vit)
    assert made.config == config
    for same in (made, pickle.loads(pickle.dumps(made)), TimmTransform({**config, "mean": list(config["mean"])})):
        assert torch.equal(same([post.open_image() for post in posts]), expected)


def test_dicts_with_fields_of_other_names_and_features(tokenizer):
    samples = [{"sentence": "red", "feature": [1.0, 2.0], "y": 0.5}, {"sentence": "circle", "feature": [3.0, 4.0], "y": 1.5}]
    names = {"main_field": "sentence", "complementary_field": "feature", "label_field": "y"}
    batch = FusionCollator(tokenizer, None, **names)(samples)
    assert torch.equal(batch["complementary_inputs"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(batch["labels"], torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([True, False], torch.int64),
        ([[True, False], [True, True]], torch.int64),
        (list(numpy.array([1, 0], dtype=numpy.int32)), torch.int64),
        (list(numpy.array([0.5, 1.5])), torch.float32),
        ([1, 0.5], torch.float32),
        ([torch.tensor([1, 0], dtype=torch.uint8), torch.tensor([1, 1], dtype=torch.uint8)], torch.int64),
    ],
)
def test_labels_are_int64_or_float32(tokenizer, labels, dtype):
    samples = [{"text": "red", "image": torch.ones(2), "label": label} for label in labels]
    got = FusionCollator(tokenizer, None)(samples)["labels"]
    assert got.dtype == dtype
    assert got.tolist() == [getattr(label, "tolist", lambda label=label: label)() for label in labels]


def test_labels_that_are_none_are_no_labels(tokenizer):
    assert "labels" not in FusionCollator(tokenizer, None)([{"text": "red", "image": torch.ones(2), "label": None}] * 2)


def test_values_that_do_not_stack_are_named(tokenizer, posts):
    samples = [{"text": "red", "image": torch.ones(2 + i)} for i in range(2)]
    with pytest.raises(ValueError, match=r"complementary_inputs can't be stacked: .*resize or pad them"):
        FusionCollator(tokenizer, None)(samples)
    with pytest.raises(ValueError, match=r"complementary_inputs can't be stacked"):
        FusionCollator(tokenizer, StackEach(vision.to_tensor))(posts)


def test_a_feature_extractor_of_sound(tokenizer):
    samples = [{"text": "red", "sound": torch.randn(1000).numpy()} for _ in range(2)]
    extractor = functools.partial(WhisperFeatureExtractor(), sampling_rate=16000, return_tensors="pt")
    batch = FusionCollator(tokenizer, extractor, complementary_field="sound")(samples)
    assert batch["complementary_inputs"]["input_features"].shape == (2, 80, 3000)
    assert "labels" not in batch


def test_posts_without_labels_make_batches_without_labels(tokenizer):
    posts = Posts((Post("1", "red", None, None), Post("2", "red", None, None)), ("a", "b"))
    batch = FusionCollator(tokenizer, PROCESSOR)(posts)
    assert list(batch) == ["main_inputs", "complementary_inputs"]
    with pytest.raises(ValueError, match="1 of 2 samples have no 'label': either all of a batch have labels, or none"):
        FusionCollator(tokenizer, PROCESSOR)([posts[0], Post("3", "red", None, 1)])


def test_labels_of_several_classes(tokenizer):
    posts = Posts(tuple(Post(str(i), "red", None, label) for i, label in enumerate([(1, 0, 1), (0, 0, 0)])), ("a", "b", "c"))
    batch = FusionCollator(tokenizer, PROCESSOR)(posts)
    assert torch.equal(batch["labels"], torch.tensor([[1, 0, 1], [0, 0, 0]]))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_it_runs_in_workers(posts, tokenizer, context):
    collate = FusionCollator(tokenizer, PROCESSOR)
    loader = DataLoader(posts, batch_size=2, collate_fn=collate, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), posts.labels)
    expected = collate(posts[:2])
    assert torch.equal(batches[0]["complementary_inputs"]["pixel_values"], expected["complementary_inputs"]["pixel_values"])


def test_a_pickled_one_does_the_same(posts, tokenizer):
    collate = FusionCollator(tokenizer, StackEach(pixels))
    again = pickle.loads(pickle.dumps(collate))
    assert torch.equal(again(posts)["complementary_inputs"], collate(posts)["complementary_inputs"])


def test_bad_input(posts, tokenizer):
    collate = FusionCollator(tokenizer, PROCESSOR)
    with pytest.raises(ValueError, match="the list of samples is empty"):
        collate([])
    with pytest.raises(TypeError, match="Post objects or dicts, got int"):
        collate([3])
    with pytest.raises(ValueError, match=r"no field 'image', only \['text', 'label'\].*remove_unused_columns=False"):
        collate([{"text": "red", "label": 1}])
    with pytest.raises(ValueError, match=r"a Post has no field 'sentence': it has \['id', 'text', 'image', 'label', 'audio'"):
        FusionCollator(tokenizer, PROCESSOR, main_field="sentence")(posts)
    with pytest.raises(TypeError, match=r"main must be a tokenizer, .* got str"):
        FusionCollator("bert", PROCESSOR)
    with pytest.raises(TypeError, match=r"main_inputs must be a tensor or a dict of tensors, got list: .*return_tensors='pt'"):
        FusionCollator(functools.partial(tokenizer), PROCESSOR)(posts)
    with pytest.raises(TypeError, match="complementary_inputs must be a tensor or a dict of tensors, got list"):
        FusionCollator(tokenizer, list)(posts)
    image = {"text": "red", "image": posts[0].open_image()}
    with pytest.raises(ValueError, match="labels must be numbers, or lists of one length"):
        collate([{**image, "label": [1, 0]}, {**image, "label": [1]}])
    for label, message in (
        ("pizza", "got 'pizza' of sample 1 of the batch; convert class names to indices first"),
        (float("nan"), "got nan of sample 1 of the batch, which is not finite"), (1e300, "1e"),
        (1j, "got 1j of sample 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"labels must be numbers.*{message}"):
            collate([{**image, "label": 1}, {**image, "label": label}])
    for samples in ([{**image, "label": 1}, image], [image, {**image, "label": 1}]):
        with pytest.raises(ValueError, match="1 of 2 samples have no 'label'"):
            collate(samples)


def test_several_sides_some_of_them_missing(posts):
    collate = FusionCollator(None, {"image": StackEach(pixels), "given": None}, main_field="id")
    samples = [{"id": i, "image": None if i == 1 else posts[i].open_image(), "given": torch.tensor([float(i)])} for i in range(3)]
    others = collate(samples)["complementary_inputs"]
    assert list(others) == ["present", "image", "given"]
    assert others["present"]["image"].tolist() == [True, False, True]
    assert list(others["present"]) == ["image"]
    for i in (0, 2):
        assert torch.equal(others["image"][i], pixels(posts[i].open_image()))
    assert torch.equal(others["image"][1], others["image"][0])  # a number, which nobody looks at
    assert collate([samples[1]])["complementary_inputs"]["image"] is None
    # a post without an image lacks it, and is not given a grey one
    bare = Post("3", "circle", None, 0)
    both = FusionCollator(
        lambda texts: torch.ones(len(texts), 1), {"picture": StackEach(pixels)}, complementary_field={"picture": "image"}
    )
    assert both([posts[0], bare])["complementary_inputs"]["present"]["picture"].tolist() == [True, False]
    with pytest.raises(ValueError, match=r"complementary_field must be a dict of the fields of \['a'\], got 'b'"):
        FusionCollator(None, {"a": None}, complementary_field="b")
    for sides in ({}, {"present": None}):
        with pytest.raises(ValueError, match="complementary must be a dict of sides, none of them called 'present'"):
            FusionCollator(None, sides)


def test_what_is_not_of_a_sample_stays_where_others_lack_a_side():
    collate = FusionCollator(None, {"a": lambda values: {"x": torch.stack(values), "scale": torch.tensor(2.0)}}, main_field="id")
    samples = [{"id": 0, "a": None}, {"id": 1, "a": torch.tensor([3.0])}]
    a = collate(samples)["complementary_inputs"]["a"]
    assert (a["x"].tolist(), a["scale"].item()) == ([[3.0], [3.0]], 2.0)


@pytest.mark.parametrize("preprocess", [PROCESSOR, StackEach(pixels)])
def test_videos_are_padded_and_say_which_frames_are_there(preprocess):
    torch.manual_seed(0)
    videos = [[Image.new("RGB", (8, 8), (20 * t, 10 * length, 0)) for t in range(length)] for length in (2, 5, 1)]
    made = EachFrame(preprocess)(videos)
    name = "pixel_values" if preprocess is PROCESSOR else "frames"
    assert made["frame_mask"].sum(1).tolist() == [2, 5, 1]
    assert made[name].shape[:2] == (3, 5)
    expected = PROCESSOR(videos[1], return_tensors="pt")["pixel_values"] if preprocess is PROCESSOR else preprocess(videos[1])
    assert torch.equal(made[name][1], expected)
    assert not made[name][2, 1:].any()
    few = EachFrame(preprocess, most=3)(videos)
    assert few["frame_mask"].sum(1).tolist() == [2, 3, 1]
    assert torch.equal(few[name][1], expected[[0, 2, 4]])
    with pytest.raises(ValueError, match="video 1 of the batch has no frame: pass None for a missing video"):
        EachFrame(preprocess)([videos[0], []])
    with pytest.raises(ValueError, match="most must be an integer >= 1 or None, got 0"):
        EachFrame(preprocess, most=0)
    again = EachFrame(preprocess)([iter(video) for video in videos])
    assert torch.equal(again[name], made[name])


def test_a_transform_that_makes_no_row_of_each_frame_is_refused():
    frames = [Image.new("RGB", (8, 8))] * 3
    with pytest.raises(ValueError, match=r"3 frames were given, but the transform gave {'frames': \(1, 2\)}: "):
        EachFrame(lambda images: torch.zeros(1, 2))([frames])
